"""The journal: accepted commands, run snapshots and kept results, durable before anybody is told.

Knows rows, digests, epochs and transactions. Does not know what a command means or when a snapshot is due
(control/keeper.py). One thread writes; whatever is asked of it while the disk is busy shares the next
transaction. Polls and samples never come here.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import logging
import queue
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from twinkle_serve.faults import reach
from twinkle_serve.storage.wal import torn_tail

_log = logging.getLogger(__name__)
_MAX_BATCH = 512
_RETRY_S = 0.5
COMMAND, GAP, VOID = "command", "gap", "void"

_metadata = sa.MetaData()
_epochs = sa.Table(
    "journal_epoch", _metadata, sa.Column("id", sa.Integer, primary_key=True), sa.Column("epoch", sa.Integer)
)
_entries = sa.Table(
    "journal_entries",
    _metadata,
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
_results = sa.Table(
    "journal_results",
    _metadata,
    sa.Column("request_id", sa.String(255), primary_key=True),
    sa.Column("run_id", sa.String(255), index=True),
    sa.Column("seq_id", sa.BigInteger),
    sa.Column("numbered", sa.Boolean),
    sa.Column("settled_at", sa.Float),
    sa.Column("payload", sa.LargeBinary),
    sa.Column("digest", sa.LargeBinary),
)
_snapshots = sa.Table(
    "journal_snapshots",
    _metadata,
    sa.Column("run_id", sa.String(255), primary_key=True),
    sa.Column("covered", sa.BigInteger, primary_key=True),
    sa.Column("file", sa.String(255)),
    sa.Column("num_bytes", sa.BigInteger),
    sa.Column("taken_at", sa.Float),
)


class Fenced(Exception):
    """Another coordinator has opened this journal since; this one must not write any more, and end."""


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


@dataclass(slots=True)
class RunHistory:
    """What the journal knows of a run: entries in order of arrival, snapshots newest first. ``damaged``:
    seq_ids of rows that are not what was written (their contents are left out), -1 if not even that
    can be read."""

    entries: list[JournalEntry] = field(default_factory=list)
    snapshots: list[StoredSnapshot] = field(default_factory=list)
    results: list[StoredResult] = field(default_factory=list)
    damaged: list[int] = field(default_factory=list)


Work = Callable[[sa.Connection], Any]


class Journal:
    """Opening it fences whoever had it open before. The methods that return a future may be called from one
    event loop only; each future is resolved once its transaction is on disk, in the order of the calls."""

    def __init__(self, root: str | Path, url: str | None = None, sync: str = "FULL") -> None:
        """``url``: any SQLAlchemy URL; None means SQLite below ``root``. ``sync``: SQLite's synchronous."""
        Path(root).mkdir(parents=True, exist_ok=True)
        path = Path(root).absolute() / "journal.sqlite"
        if url is None and (torn := torn_tail(path)):
            _log.warning("%s: %s; everything before it is kept", path, torn)
        self._engine = _open(url or f"sqlite:///{path}", sync)
        _metadata.create_all(self._engine)
        with self._engine.begin() as connection:
            self.epoch = _next_epoch(connection)
        self.num_bytes = 0
        self.stalled: str | None = None
        self._queue: queue.SimpleQueue[tuple[Work, Any] | None] = queue.SimpleQueue()
        self._closing = False
        self._writer = threading.Thread(target=self._write, name="journal", daemon=True)
        self._writer.start()

    def close(self, timeout_s: float = 10.0) -> None:
        """Write what was asked for, then end the writer."""
        self._closing = True
        self._queue.put(None)
        self._writer.join(timeout_s)
        self._engine.dispose()

    # writing --------------------------------------------------------------------------------------

    def append(self, entry: JournalEntry) -> asyncio.Future[None]:
        self.num_bytes += len(entry.payload)
        row = _row(entry)
        return self._do(lambda connection: connection.execute(_entries.insert().values(row)))

    def cover(
        self,
        snapshot: StoredSnapshot,
        results: Sequence[StoredResult],
        drop_until: int,
        drop_snapshots: Collection[int] = (),
    ) -> asyncio.Future[None]:
        """List a snapshot whose file is whole, keep ``results``, and drop the entries up to seq_id
        ``drop_until`` and the snapshots named by what they cover. All or nothing."""

        def work(connection: sa.Connection) -> None:
            run_id = snapshot.run_id
            _store(connection, results)
            _drop_snapshots(connection, run_id, [*drop_snapshots, snapshot.covered])
            connection.execute(
                _snapshots.insert().values({c.name: getattr(snapshot, c.name) for c in _snapshots.c})
            )
            self._drop_entries(connection, (_entries.c.run_id == run_id) & (_entries.c.seq_id <= drop_until))

        return self._do(work)

    def retire(self, run_id: str, results: Sequence[StoredResult]) -> asyncio.Future[None]:
        """Drop all of a run but ``results``: it is over."""

        def work(connection: sa.Connection) -> None:
            _store(connection, results)
            connection.execute(_snapshots.delete().where(_snapshots.c.run_id == run_id))
            self._drop_entries(connection, _entries.c.run_id == run_id)

        return self._do(work)

    def expire_results(self, settled_before: float) -> asyncio.Future[None]:
        return self._do(
            lambda connection: connection.execute(
                _results.delete().where(_results.c.settled_at < settled_before)
            )
        )

    def flush(self) -> asyncio.Future[None]:
        """Done when everything asked for before is on disk."""
        return self._do(lambda connection: None)

    # reading --------------------------------------------------------------------------------------

    def histories(self) -> dict[str, RunHistory]:
        """Everything, by run id; for the start, before anything is written."""
        with self._engine.connect() as connection:
            try:
                histories = _read(connection)
            except sa.exc.DatabaseError as error:
                _log.error("the journal is damaged: %s; the runs that it touches are left out", error.orig)
                histories = {run_id: self._salvage(connection, run_id) for run_id in _run_ids(connection)}
        entries = (entry for history in histories.values() for entry in history.entries)
        self.num_bytes = sum(len(entry.payload) for entry in entries)
        return histories

    def _salvage(self, connection: sa.Connection, run_id: str) -> RunHistory:
        try:
            return _read(connection, run_id)[run_id]
        except sa.exc.DatabaseError:
            return RunHistory(damaged=[-1])

    def history(self, run_id: str) -> asyncio.Future[RunHistory]:
        """One run's, with all that was asked for before."""
        return self._do(lambda connection: _read(connection, run_id)[run_id])

    # the writer -----------------------------------------------------------------------------------

    def _do(self, work: Work) -> asyncio.Future[Any]:
        future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._queue.put((work, future))
        return future

    def _write(self) -> None:
        ending = False
        while not ending:
            batch = [self._queue.get()]
            while len(batch) < _MAX_BATCH and not self._queue.empty():
                batch.append(self._queue.get())
            ending = None in batch
            jobs = [job for job in batch if job is not None]
            if jobs:
                self._commit(jobs)

    def _commit(self, jobs: Sequence[tuple[Work, Any]]) -> None:
        """One transaction, tried until it succeeds: what was accepted must not be dropped because the
        disk is full, and nobody is told meanwhile that it is safe."""
        while True:
            try:
                with self._engine.begin() as connection:
                    self._check_epoch(connection)
                    answers = [work(connection) for work, _ in jobs]
                    reach("in journal")
                break
            except sa.exc.DBAPIError as error:
                if not isinstance(error, sa.exc.OperationalError) or self._closing:
                    return _resolve(jobs, error=error)
                if self.stalled is None:
                    _log.error("the journal cannot be written: %s", error.orig)
                self.stalled = str(error.orig)
                time.sleep(_RETRY_S)
            except Exception as error:
                return _resolve(jobs, error=error)
        if self.stalled is not None:
            _log.warning("the journal can be written again")
            self.stalled = None
        _resolve(jobs, answers=answers)

    def _check_epoch(self, connection: sa.Connection) -> None:
        """In each transaction, as its first write: so no other can open the journal until it ends."""
        mine = _epochs.update().where(_epochs.c.epoch == self.epoch).values(epoch=self.epoch)
        if connection.execute(mine).rowcount != 1:
            raise Fenced("another coordinator has taken over")

    def _drop_entries(self, connection: sa.Connection, where: sa.ColumnElement[bool]) -> None:
        size = sa.select(sa.func.sum(sa.func.length(_entries.c.payload))).where(where)
        self.num_bytes -= int(connection.execute(size).scalar() or 0)
        connection.execute(_entries.delete().where(where))


def _resolve(
    jobs: Iterable[tuple[Work, Any]], answers: Sequence[Any] = (), error: Exception | None = None
) -> None:
    futures = [future for _, future in jobs]

    def settle() -> None:
        for index, future in enumerate(futures):
            if future.done():
                continue  # whoever asked has gone
            if error is not None:
                future.set_exception(error)
                future.exception()  # nobody may be waiting for it
            else:
                future.set_result(answers[index])

    with contextlib.suppress(RuntimeError):  # the loop has ended
        futures[0].get_loop().call_soon_threadsafe(settle)


def _open(url: str, sync: str) -> sa.Engine:
    in_memory = url in ("sqlite://", "sqlite:///:memory:")
    options = {"poolclass": sa.StaticPool, "connect_args": {"check_same_thread": False}} if in_memory else {}
    engine = sa.create_engine(url, **options)
    if engine.dialect.name == "sqlite":

        @sa.event.listens_for(engine, "connect")
        def _durable(connection: Any, _: Any) -> None:
            connection.execute("PRAGMA journal_mode=WAL")
            connection.execute(f"PRAGMA synchronous={sync}")
            connection.execute("PRAGMA busy_timeout=10000")

    return engine


def _next_epoch(connection: sa.Connection) -> int:
    connection.execute(_epochs.update().values(epoch=_epochs.c.epoch + 1))
    epoch = connection.execute(sa.select(_epochs.c.epoch)).scalar()
    if epoch is None:
        connection.execute(_epochs.insert().values(id=1, epoch=1))
        return 1
    return int(epoch)


def _store(connection: sa.Connection, results: Sequence[StoredResult]) -> None:
    if not results:
        return
    ids = [result.request_id for result in results]
    for start in range(0, len(ids), 500):
        connection.execute(_results.delete().where(_results.c.request_id.in_(ids[start : start + 500])))
    connection.execute(_results.insert(), [_row(result) for result in results])


def _drop_snapshots(connection: sa.Connection, run_id: str, covered: Collection[int]) -> None:
    mine = (_snapshots.c.run_id == run_id) & _snapshots.c.covered.in_(list(covered))
    connection.execute(_snapshots.delete().where(mine))


def _row(record: JournalEntry | StoredResult) -> dict[str, Any]:
    values = {name: getattr(record, name) for name in type(record).__dataclass_fields__}
    return values | {"digest": _digest(record)}


def _digest(record: JournalEntry | StoredResult) -> bytes:
    kind = record.kind if isinstance(record, JournalEntry) else "result"
    names = [record.run_id, record.seq_id, record.request_id, record.numbered, kind]
    digest = hashlib.blake2b(repr(names).encode(), digest_size=16)
    digest.update(record.payload)
    return digest.digest()


def _read(connection: sa.Connection, run_id: str | None = None) -> dict[str, RunHistory]:
    histories: dict[str, RunHistory] = defaultdict(RunHistory)

    def rows(table: sa.Table, order: sa.ColumnElement[Any]) -> Any:
        query = sa.select(table).order_by(order)
        return connection.execute(query if run_id is None else query.where(table.c.run_id == run_id))

    for row in rows(_entries, _entries.c.position):
        _take_in(histories, JournalEntry, row)
    for row in rows(_results, _results.c.settled_at):
        _take_in(histories, StoredResult, row)
    for row in rows(_snapshots, _snapshots.c.covered.desc()):
        histories[row.run_id].snapshots.append(StoredSnapshot(**row._mapping))
    return histories if run_id is None else {run_id: histories[run_id]}


def _run_ids(connection: sa.Connection) -> list[str]:
    """Each table as far as it can be read."""
    found: set[str] = set()
    for table in (_entries, _results, _snapshots):
        try:
            found.update(connection.execute(sa.select(table.c.run_id).distinct()).scalars())
        except sa.exc.DatabaseError:
            _log.error("the journal's table %s cannot be read to its end", table.name)
    return sorted(found)


def _take_in(histories: dict[str, RunHistory], kind: type[Any], row: Any) -> None:
    record = kind(**{name: getattr(row, name) for name in kind.__dataclass_fields__})
    history = histories[record.run_id]
    if row.digest != _digest(record):
        _log.error("journal: the row of seq_id %s of run %s is damaged", record.seq_id, record.run_id)
        history.damaged.append(record.seq_id)
    elif kind is JournalEntry:
        history.entries.append(record)
    else:
        history.results.append(record)
