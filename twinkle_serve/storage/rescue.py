"""A SQLite journal whose pages are damaged or missing: what can still be read of it, in a new file.

SQLite refuses a file that is cut short, and with a bad page all that lies behind it. Here every row that can
be read is copied as it is, digest included, and a run that lacks an entry gets one that cannot be read, so
that it is marked like any other with a damaged row (journal_rows.py). Knows the journal's tables and not
what is in a row. The log beside the file is wal.py's.
"""

from __future__ import annotations

import os
import shutil
import sqlite3
from collections import defaultdict
from collections.abc import Iterator
from contextlib import closing, suppress
from pathlib import Path
from typing import Any, BinaryIO

import sqlalchemy as sa

from twinkle_serve.storage.journal_rows import COMMAND, ENTRIES, EPOCHS, GAP, METADATA, RESULTS, SNAPSHOTS

_TABLES = (EPOCHS, ENTRIES, RESULTS, SNAPSHOTS)
# As many row ids as a damaged page may hold are tried one by one, then ever fewer.
_NEAR = 2000
_LAST_ROW = 2**62
_PAGE = 4096
(_INDEX,) = (index.name for index in ENTRIES.indexes)


def rescue(database: Path) -> str | None:
    """What is wrong with the pages of ``database``, or None. A damaged file is replaced by one with all that
    could be read, and kept beside it. Reads the whole file; nobody else may have it open."""
    done = database.with_name(f"{database.name}.rescued")
    if not done.exists():
        problem = _problem(database)
        if problem is None:
            return None
        _make(database, done)
    else:
        problem = "its rescue was interrupted"
    for end in ("-wal", "-shm"):  # before the new file is there: SQLite would take them for its own
        database.with_name(f"{database.name}{end}").unlink(missing_ok=True)
    counts = _counts(done)
    os.replace(done, database)
    return f"{problem}; read and kept: {counts}"


def _problem(database: Path) -> str | None:
    if not database.exists():
        return None
    try:
        with closing(sqlite3.connect(database)) as connection:
            (first,) = connection.execute("PRAGMA quick_check(1)").fetchone()
            return None if first == "ok" else str(first)
    except sqlite3.OperationalError:
        return None  # not the file, but how it can be reached: whoever opens it next will hear of it
    except sqlite3.DatabaseError as error:
        return str(error)


def _make(database: Path, done: Path) -> None:
    damaged = database.with_name(f"{database.name}.damaged")
    for end in ("", "-wal"):
        with suppress(FileNotFoundError):
            shutil.copyfile(f"{database}{end}", f"{damaged}{end}")
    partial = database.with_name(f"{database.name}.partial")
    partial.unlink(missing_ok=True)
    engine = sa.create_engine(f"sqlite:///{partial}")
    METADATA.create_all(engine)
    engine.dispose()
    cut_short = _is_cut_short(damaged)
    _make_first_page_readable(damaged, partial)
    with closing(sqlite3.connect(damaged)) as old, closing(sqlite3.connect(partial)) as new:
        old.text_factory = lambda text: text.decode(errors="replace")
        for table in _TABLES:
            places = ", ".join("?" * len(table.c))
            # A row may be there twice, by damage.
            new.executemany(f"INSERT OR IGNORE INTO {table.name} VALUES ({places})", _rows(old, table))
        # At its end a journal may lack what was last: that is said, and the runs go on from there.
        _mark(new, _with_holes(new) | (set() if cut_short else _with_lost_ends(old, new)))
        new.commit()
    os.replace(partial, done)


def _is_cut_short(database: Path) -> bool:
    with database.open("rb") as file:
        num_pages = int.from_bytes(file.read(32)[28:], "big")
    return num_pages * _PAGE > database.stat().st_size


def _make_first_page_readable(damaged: Path, blank: Path) -> None:
    """The first page says how many pages there are, or SQLite reads none if some are missing, and where the
    tables begin, which is the same in each journal."""
    first = blank.read_bytes()[:_PAGE]
    num_pages = -(-damaged.stat().st_size // _PAGE)
    with damaged.open("r+b") as file:
        file.truncate(num_pages * _PAGE)
        _write_count(file, num_pages)
    if not _has_tables(damaged):
        with damaged.open("r+b") as file:
            file.write(first)
            _write_count(file, num_pages)


def _write_count(file: BinaryIO, num_pages: int) -> None:
    file.seek(28)
    file.write(num_pages.to_bytes(4, "big"))
    file.seek(0)


def _has_tables(database: Path) -> bool:
    try:
        with closing(sqlite3.connect(database)) as connection:
            found = {name for (name,) in connection.execute("SELECT name FROM sqlite_master")}
    except sqlite3.DatabaseError:
        return False
    return found.issuperset(table.name for table in _TABLES)


def _rows(connection: sqlite3.Connection, table: sa.Table) -> Iterator[tuple[Any, ...]]:
    """Those that can be read, by row id, each by itself: one that cannot be read ends a query."""
    columns = ", ".join(table.c.keys())
    query = f"SELECT rowid, {columns} FROM {table.name} WHERE rowid > ? ORDER BY rowid LIMIT 1"
    last, failures, step = 0, 0, 1
    while last < _LAST_ROW:
        try:
            row = connection.execute(query, (last,)).fetchone()
            if row is not None and row[0] <= last:
                raise sqlite3.DatabaseError("pages in a circle")
        except sqlite3.DatabaseError:
            last, failures = last + step, failures + 1
            step = 1 if failures < _NEAR else 2 * step
            continue
        if row is None:
            return
        yield row[1:]
        last, failures, step = row[0], 0, 1


def _with_holes(connection: sqlite3.Connection) -> set[str]:
    """The runs whose entries do not follow one another from their newest snapshot on; where there is no entry
    at all, all."""
    excused: dict[str, int] = defaultdict(lambda: -1)
    # Nothing is needed of what a snapshot covers, or of what was missing when the run's log went on without.
    gaps = f"SELECT run_id, seq_id FROM {ENTRIES.name} WHERE kind = '{GAP}'"
    for run_id, seq_id in connection.execute(
        f"SELECT run_id, covered FROM {SNAPSHOTS.name} UNION ALL {gaps}"
    ):
        excused[run_id] = max(excused[run_id], seq_id)
    there: dict[str, set[int]] = defaultdict(set)
    for run_id, seq_id in connection.execute(
        f"SELECT run_id, seq_id FROM {ENTRIES.name} WHERE kind = '{COMMAND}' AND typeof(seq_id) = 'integer'"
    ):
        there[run_id].add(seq_id)
    if not there:
        return set(excused)
    return {run_id for run_id, seq_ids in there.items() if _has_hole(seq_ids, excused[run_id] + 1)}


def _has_hole(seq_ids: set[int], first: int) -> bool:
    # By their number: a client may have sent one far ahead of all others.
    return sum(seq_id >= first for seq_id in seq_ids) < max(seq_ids) + 1 - first


def _with_lost_ends(old: sqlite3.Connection, new: sqlite3.Connection) -> set[str]:
    """The runs of which the index knows later entries than could be read."""
    last = dict(new.execute(f"SELECT run_id, max(position) FROM {ENTRIES.name} GROUP BY run_id"))
    found = set()
    with suppress(sqlite3.DatabaseError):
        for run_id, position in old.execute(
            f"SELECT run_id, position FROM {ENTRIES.name} INDEXED BY {_INDEX}"
        ):
            if position > last.get(run_id, 0):
                found.add(run_id)
    return found


def _mark(connection: sqlite3.Connection, run_ids: set[str]) -> None:
    """By an entry that is damaged."""
    query = (
        f"INSERT INTO {ENTRIES.name} (run_id, request_id, kind, payload, digest) VALUES (?, '', ?, x'', x'')"
    )
    connection.executemany(query, [(run_id, COMMAND) for run_id in sorted(run_ids)])


def _counts(database: Path) -> str:
    with closing(sqlite3.connect(database)) as connection:
        tables = (ENTRIES, RESULTS, SNAPSHOTS)
        counts = [connection.execute(f"SELECT count(*) FROM {t.name}").fetchone()[0] for t in tables]
    return f"{counts[0]} entries, {counts[1]} results, {counts[2]} snapshots"
