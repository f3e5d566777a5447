"""Which database belongs to which directory of files, so that neither is ever cleared up by the other's rows.

Knows an id that is in both: a small file in the directory, a row in the database. Does not know what either
is for. A disk that is not mounted yet, or a URL that names another database, is said instead of served.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterable
from pathlib import Path

import sqlalchemy as sa

from twinkle_serve.storage.checkpoints import write_file

ID_FILE = "storage.id"
# Metadata of its own: what rescue.py knows of a journal stays as it is.
_metadata = sa.MetaData()
_ties = sa.Table(
    "storage_ties",
    _metadata,
    sa.Column("name", sa.String(32), primary_key=True),
    sa.Column("storage_id", sa.String(64), nullable=False),
)


class NotTied(Exception):
    """The files and the database do not belong together. The message, one line, says which and what to do."""


def tie(
    connection: sa.Connection, name: str, directory: Path, *, is_blank: bool, others: Iterable[Path] = ()
) -> None:
    """Make ``directory`` and the database that calls itself ``name`` belong together, or see that they do.

    is_blank: the database has never been used. others: more directories with files that only it knows.
    Raises NotTied, before anything is made.
    """
    _metadata.create_all(connection)
    file = directory / ID_FILE
    ours = file.read_text().strip() if file.is_file() else None
    theirs = connection.execute(sa.select(_ties.c.storage_id).where(_ties.c.name == name)).scalar()
    database = f"the {name} database (storage.{name}_url)"
    if theirs is not None:
        if ours != theirs:
            found = f"has no {ID_FILE}" if ours is None else f"belongs to another one ({ID_FILE})"
            raise NotTied(
                f"{directory} {found}: {database} belongs to the directory whose {ID_FILE} says {theirs}; is "
                "the disk mounted, and are storage.root and the URL right?"
            )
        return
    if is_blank:
        held = next((path for path in (directory, *others) if _holds_files(path)), None)
        if held is not None:
            raise NotTied(
                f"{held} holds files, but {database} is empty: is it the right one? To begin anew, move the "
                "directory away"
            )
    elif not directory.is_dir():
        raise NotTied(f"{directory} is not there, but {database} is in use: is the disk mounted?")
    if ours is None:
        ours = uuid.uuid4().hex
        write_file(file, f"{ours}\n".encode())
    connection.execute(_ties.insert().values(name=name, storage_id=ours))


def _holds_files(directory: Path) -> bool:
    return directory.is_dir() and any(path.name != ID_FILE for path in directory.iterdir())
