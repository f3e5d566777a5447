"""The catalogue: which sessions, runs, samplers and checkpoints exist, kept in a SQL database.

Knows tables, rows and where a checkpoint's directory lies. Does not know scheduling, tenancy rules or what
is in a checkpoint. One writer; nothing here is on the path of a poll or a sample.
"""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote

import sqlalchemy as sa

from twinkle_serve.protocol.data import LoraSpec
from twinkle_serve.storage import checkpoints
from twinkle_serve.storage.records import (
    CheckpointRecord,
    LossRecord,
    RunRecord,
    SamplerRecord,
    SessionRecord,
)
from twinkle_serve.storage.states import STATES
from twinkle_serve.storage.tie import tie

_log = logging.getLogger(__name__)
_MAX_SEGMENT_BYTES = 200
CHECKPOINTS = "checkpoints"
_DELETED = ".deleted"
Record = SessionRecord | RunRecord | SamplerRecord | LossRecord | CheckpointRecord

# Each table is its key, the tenant, and the whole record as JSON: a field that a later version adds with a
# default needs no migration.
_metadata = sa.MetaData()


def _table(name: str, *keys: str) -> sa.Table:
    columns = [sa.Column(key, sa.String(255), primary_key=True) for key in keys]
    return sa.Table(
        name, _metadata, *columns, sa.Column("tenant", sa.String(255)), sa.Column("record", sa.Text)
    )


_TABLES: dict[type[Record], sa.Table] = {
    SessionRecord: _table("sessions", "session_id"),
    RunRecord: _table("runs", "run_id"),
    SamplerRecord: _table("samplers", "sampler_id"),
    LossRecord: _table("custom_losses", "loss_id"),
    CheckpointRecord: _table("checkpoints", "run_id", "kind", "name"),
}


@dataclasses.dataclass(frozen=True, slots=True)
class Contents:
    """Everything in the catalogue, each in the order of creation."""

    sessions: tuple[SessionRecord, ...]
    runs: tuple[RunRecord, ...]
    samplers: tuple[SamplerRecord, ...]
    checkpoints: tuple[CheckpointRecord, ...]
    losses: tuple[LossRecord, ...] = ()


class Catalog:
    """Rows of one database, and checkpoint directories below ``root``. A write is durable on return."""

    def __init__(self, root: str | Path, url: str | None = None) -> None:
        """Open or create. ``url``: any SQLAlchemy URL; None means SQLite below ``root``. Raises NotTied if
        the database and the root do not belong together."""
        root = Path(root).absolute()
        self._checkpoints = root / CHECKPOINTS
        if url is None:
            root.mkdir(parents=True, exist_ok=True)
        self._engine = _open(url or f"sqlite:///{root / 'catalog.sqlite'}")
        try:
            _metadata.create_all(self._engine)
            with self._engine.begin() as connection:
                is_blank = all(
                    connection.execute(sa.select(t).limit(1)).first() is None for t in _TABLES.values()
                )
                # It is also what says which snapshots of samplers are wanted.
                tie(connection, "catalog", self._checkpoints, is_blank=is_blank, others=[root / STATES])
        except BaseException:
            self._engine.dispose()
            raise
        self._checkpoints.mkdir(exist_ok=True)

    def close(self) -> None:
        self._engine.dispose()

    def put_session(self, record: SessionRecord) -> None:
        self._put(record)

    def put_run(self, record: RunRecord) -> None:
        self._put(record)

    def put_sampler(self, record: SamplerRecord) -> None:
        self._put(record)

    def put_loss(self, record: LossRecord) -> None:
        self._put(record)

    def delete_loss(self, loss_id: str) -> None:
        table = _TABLES[LossRecord]
        with self._engine.begin() as connection:
            connection.execute(table.delete().where(*_key(table, loss_id)))

    def put_checkpoint(self, record: CheckpointRecord) -> None:
        """List a checkpoint; call it once its directory is whole."""
        self._put(record)

    def delete_checkpoint(self, run_id: str, kind: str, name: str) -> None:
        """Take a checkpoint out of the list; its directory is remove_directory's business."""
        table = _TABLES[CheckpointRecord]
        with self._engine.begin() as connection:
            connection.execute(table.delete().where(*_key(table, run_id, kind, name)))

    def set_checkpoint(
        self, run_id: str, kind: str, name: str, *, public: bool, expires_at: float | None
    ) -> None:
        """Change what may change of a listed checkpoint. Raises KeyError if it is not listed."""
        table = _TABLES[CheckpointRecord]
        with self._engine.begin() as connection:
            row = connection.execute(
                sa.select(table.c.record).where(*_key(table, run_id, kind, name))
            ).first()
            if row is None:
                raise KeyError((run_id, kind, name))
            tree = {**json.loads(row.record), "public": public, "expires_at": expires_at}
            change = table.update().where(*_key(table, run_id, kind, name))
            connection.execute(change.values(record=json.dumps(tree)))

    def load_all(self) -> Contents:
        """Everything, after clearing up behind a crash: leftovers of killed writers are swept, and a
        checkpoint whose files are not all there leaves the list with a line in the log."""
        for path in checkpoints.sweep(self._checkpoints):
            _log.warning("swept %s, left by a writer that was killed", path)
        rows = self._load(CheckpointRecord)
        self._remove_deleted(rows)
        return Contents(
            tuple(self._load(SessionRecord)),
            tuple(self._load(RunRecord)),
            tuple(self._load(SamplerRecord)),
            tuple(whole for record in rows if (whole := self._checked(record))),
            tuple(self._load(LossRecord)),
        )

    def directory_for(self, run_id: str, kind: str, name: str) -> str:
        """Where that checkpoint lies or would lie: always below root. Raises ValueError if a part cannot
        be a file name."""
        return checkpoint_directory(self._checkpoints.parent, run_id, kind, name)

    def copy_directory(self, source: str | Path, target: str | Path) -> int:
        """A second checkpoint of the same files, which are shared on disk where the file system can. Its size
        in bytes. Raises CheckpointError."""
        assert Path(target).resolve().is_relative_to(self._checkpoints.resolve()), target
        return checkpoints.copy_checkpoint(source, target)

    def remove_directory(self, directory: str | Path) -> None:
        """Delete a checkpoint's files; nothing happens if they are gone."""
        path = Path(directory)
        assert path.resolve().is_relative_to(self._checkpoints.resolve()), path
        checkpoints.remove_checkpoint(path)

    def mark_deleted(self, directory: str | Path, is_deleted: bool = True) -> None:
        """Say on disk that nobody lists this checkpoint, whose files are still being read: if this process
        dies before ``remove_directory``, ``load_all`` removes them."""
        mark = Path(directory) / _DELETED
        try:
            mark.touch() if is_deleted else mark.unlink(missing_ok=True)
        except OSError as error:
            _log.warning("%s is not marked as deleted: %s", directory, error)

    def files(self, directory: str | Path) -> dict[str, int]:
        """Relative name to size in bytes of every file of a checkpoint. Raises CheckpointError."""
        sizes = {name: entry["size"] for name, entry in checkpoints.read_manifest(directory)["files"].items()}
        sizes[checkpoints.MANIFEST] = (Path(directory) / checkpoints.MANIFEST).stat().st_size
        return sizes

    def _put(self, record: Record) -> None:
        table = _TABLES[type(record)]
        tree = dataclasses.asdict(record)
        values = {column.name: tree[column.name] for column in table.primary_key}
        with self._engine.begin() as connection:
            connection.execute(table.delete().where(*_key(table, *values.values())))
            row = {**values, "tenant": record.tenant, "record": json.dumps(tree)}
            connection.execute(table.insert().values(row))

    def _load(self, kind: type[Any]) -> list[Any]:
        with self._engine.connect() as connection:
            rows = connection.execute(sa.select(_TABLES[kind].c.record)).scalars().all()
        return sorted((_record(kind, json.loads(row)) for row in rows), key=lambda record: record.created_at)

    def _remove_deleted(self, listed: Iterable[CheckpointRecord]) -> None:
        """Only what is marked, never what merely has no row: the rows may be an older backup's."""
        kept = {self.directory_for(record.run_id, record.kind, record.name) for record in listed}
        for mark in list(self._checkpoints.glob(f"*/*/*/{_DELETED}")):
            if str(mark.parent) not in kept:
                checkpoints.remove_checkpoint(mark.parent)
                _log.warning("removed %s, deleted while it was being read", mark.parent)

    def _checked(self, record: CheckpointRecord) -> CheckpointRecord | None:
        """The record with what is really on disk, or None when the checkpoint is not whole.

        The directory is derived anew, so that a root can be moved; and a writer that died between replacing
        a checkpoint and listing it leaves the old size in the row.
        """
        name = f"{record.run_id}/{record.kind}/{record.name}"
        directory = self.directory_for(record.run_id, record.kind, record.name)
        try:
            checkpoints.check_sizes(directory)
            size = sum(self.files(directory).values())
        except checkpoints.CheckpointError as error:
            if not Path(directory).parent.is_dir():  # which nothing here ever removes: the disk is away
                _log.error("checkpoint %s is not there now, nor is the directory it was in", name)
                return dataclasses.replace(record, directory=directory)
            _log.error("dropped checkpoint %s from the list: %s", name, error)
            self.delete_checkpoint(record.run_id, record.kind, record.name)
            return None
        except OSError as error:
            # It may be whole, so its name stays taken; whoever reads it meets the error again.
            _log.error("checkpoint %s cannot be read now: %s", name, error)
            return dataclasses.replace(record, directory=directory)
        return dataclasses.replace(record, directory=directory, size_bytes=size)


def checkpoint_directory(root: str | Path, run_id: str, kind: str, name: str) -> str:
    """As ``Catalog.directory_for``, without its database."""
    parts = (_segment(run_id), _segment(kind), _segment(name))
    return str((Path(root).absolute() / CHECKPOINTS).joinpath(*parts))


def _open(url: str) -> sa.Engine:
    engine = sa.create_engine(url)
    if engine.dialect.name == "sqlite":

        @sa.event.listens_for(engine, "connect")
        def _durable(connection: Any, _: Any) -> None:
            connection.execute("PRAGMA journal_mode=WAL")
            connection.execute("PRAGMA synchronous=FULL")
            connection.execute("PRAGMA busy_timeout=10000")

    return engine


def _key(table: sa.Table, *values: str) -> list[sa.ColumnElement[bool]]:
    return [column == value for column, value in zip(table.primary_key, values, strict=True)]


def _record(kind: type[Any], tree: Mapping[str, Any]) -> Any:
    values = dict(tree)
    if "spec" in values:
        values["spec"] = LoraSpec(**values["spec"])
    return kind(**values)


def _segment(part: str) -> str:
    """One path segment for any text, different for different texts; never hidden, ``.`` or ``..``."""
    encoded = quote(part, safe="")
    if encoded.startswith("."):
        encoded = "%2E" + encoded[1:]
    if not 0 < len(encoded) <= _MAX_SEGMENT_BYTES:
        raise ValueError(f"{part[:80]!r} cannot name a checkpoint: 1 to {_MAX_SEGMENT_BYTES} bytes")
    return encoded
