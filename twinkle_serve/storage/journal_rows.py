"""The journal's tables and what a row of each is: with a digest, so that a damaged row is known as one.

Knows columns and digests, and how to read what can be read. Does not know who writes when (journal.py).
"""

from __future__ import annotations

import hashlib
import logging
from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any

import sqlalchemy as sa

_log = logging.getLogger(__name__)
COMMAND, GAP, VOID = "command", "gap", "void"

METADATA = sa.MetaData()
EPOCHS = sa.Table(
    "journal_epoch", METADATA, sa.Column("id", sa.Integer, primary_key=True), sa.Column("epoch", sa.Integer)
)
ENTRIES = sa.Table(
    "journal_entries",
    METADATA,
    sa.Column("position", sa.BigInteger().with_variant(sa.Integer, "sqlite"), primary_key=True),
    sa.Column("run_id", sa.String(255), index=True),
    sa.Column("seq_id", sa.BigInteger),
    sa.Column("numbered", sa.Boolean),
    sa.Column("request_id", sa.String(255)),
    sa.Column("kind", sa.String(16)),
    sa.Column("accepted_at", sa.Float),
    sa.Column("payload", sa.LargeBinary),
    sa.Column("digest", sa.LargeBinary),
)
RESULTS = sa.Table(
    "journal_results",
    METADATA,
    sa.Column("request_id", sa.String(255), primary_key=True),
    sa.Column("run_id", sa.String(255), index=True),
    sa.Column("seq_id", sa.BigInteger),
    sa.Column("numbered", sa.Boolean),
    sa.Column("settled_at", sa.Float),
    sa.Column("payload", sa.LargeBinary),
    sa.Column("digest", sa.LargeBinary),
)
SNAPSHOTS = sa.Table(
    "journal_snapshots",
    METADATA,
    sa.Column("run_id", sa.String(255), primary_key=True),
    sa.Column("covered", sa.BigInteger, primary_key=True),
    sa.Column("file", sa.String(255)),
    sa.Column("num_bytes", sa.BigInteger),
    sa.Column("taken_at", sa.Float),
)


@dataclass(frozen=True, slots=True)
class JournalEntry:
    """An accepted command (``payload`` is control.codec's), a GAP (the run's log gave up waiting), or a VOID
    (the command with that request id is not to be done).

    numbered: the client gave ``seq_id``; otherwise the log did, and it identifies no duplicates.
    """

    run_id: str
    seq_id: int
    request_id: str
    payload: bytes
    accepted_at: float
    numbered: bool = True
    kind: str = COMMAND


@dataclass(frozen=True, slots=True)
class StoredResult:
    """What a promise was settled with, for as long as it can be asked for again."""

    run_id: str
    seq_id: int
    request_id: str
    payload: bytes
    settled_at: float
    numbered: bool = True


@dataclass(frozen=True, slots=True)
class StoredSnapshot:
    """A run's whole state after all commands up to ``covered``; ``file`` is a name, not a path."""

    run_id: str
    covered: int
    file: str
    num_bytes: int
    taken_at: float


@dataclass(frozen=True, slots=True)
class DamagedEntry:
    """An entry that is not what was written, and what its row says, which may be wrong: its seq_id (None: not
    even that can be read) and its request. after: how many whole entries of the run came before it."""

    seq_id: int | None = None
    request_id: str = ""
    after: int = 0


@dataclass(slots=True)
class RunHistory:
    """What the journal knows of a run: entries in order of arrival, snapshots newest first."""

    entries: list[JournalEntry] = field(default_factory=list)
    snapshots: list[StoredSnapshot] = field(default_factory=list)
    results: list[StoredResult] = field(default_factory=list)
    damaged: list[DamagedEntry] = field(default_factory=list)


def row_of(record: JournalEntry | StoredResult) -> dict[str, Any]:
    values = {name: getattr(record, name) for name in type(record).__dataclass_fields__}
    return values | {"digest": _digest(record)}


def _digest(record: JournalEntry | StoredResult) -> bytes:
    kind = record.kind if isinstance(record, JournalEntry) else "result"
    names = [record.run_id, record.seq_id, record.request_id, record.numbered, kind]
    digest = hashlib.blake2b(repr(names).encode(), digest_size=16)
    digest.update(record.payload)
    return digest.digest()


def read(connection: sa.Connection, run_id: str | None = None) -> dict[str, RunHistory]:
    histories: dict[str, RunHistory] = defaultdict(RunHistory)

    def rows(table: sa.Table, order: sa.ColumnElement[Any]) -> Any:
        query = sa.select(table).order_by(order)
        return connection.execute(query if run_id is None else query.where(table.c.run_id == run_id))

    for row in rows(ENTRIES, ENTRIES.c.position):
        _take_in(histories, JournalEntry, row)
    for row in rows(RESULTS, RESULTS.c.settled_at):
        _take_in(histories, StoredResult, row)
    for row in rows(SNAPSHOTS, SNAPSHOTS.c.covered.desc()):
        histories[row.run_id].snapshots.append(StoredSnapshot(**row._mapping))
    return histories if run_id is None else {run_id: histories[run_id]}


def _take_in(histories: dict[str, RunHistory], kind: type[Any], row: Any) -> None:
    record = kind(**{name: getattr(row, name) for name in kind.__dataclass_fields__})
    history = histories[record.run_id]
    if row.digest != _digest(record):
        what = "entry" if kind is JournalEntry else "result"
        _log.error("journal: the %s of seq_id %s of run %s is damaged", what, record.seq_id, record.run_id)
        if kind is JournalEntry:
            history.damaged.append(DamagedEntry(record.seq_id, record.request_id, len(history.entries)))
    elif kind is JournalEntry:
        history.entries.append(record)
    else:
        history.results.append(record)
