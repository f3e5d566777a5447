"""The journal: accepted commands, run snapshots and kept results, durable before anybody is told.

Knows rows, digests, epochs and transactions. Does not know what a command means or when a snapshot is due
(control/keeper.py). One thread writes; whatever is asked of it while the disk is busy shares the next
transaction. Polls and samples never come here.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import queue
import threading
import time
from collections.abc import Callable, Collection, Iterable, Sequence
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from twinkle_serve.faults import reach
from twinkle_serve.storage.journal_rows import (
    ENTRIES,
    EPOCHS,
    METADATA,
    RESULTS,
    SNAPSHOTS,
    JournalEntry,
    RunHistory,
    StoredResult,
    StoredSnapshot,
    read,
    row_of,
)
from twinkle_serve.storage.rescue import rescue
from twinkle_serve.storage.states import STATES
from twinkle_serve.storage.tie import tie
from twinkle_serve.storage.wal import mend

_log = logging.getLogger(__name__)
_MAX_BATCH = 512
_RETRY_S = 0.5


class Fenced(Exception):
    """Another coordinator has opened this journal since; this one must not write any more, and end."""


Work = Callable[[sa.Connection], Any]
_INSERT = ENTRIES.insert()


class Journal:
    """Opening it fences whoever had it open before. The methods that return a future may be called from one
    event loop only; each future is resolved once its transaction is on disk, in the order of the calls."""

    def __init__(self, root: str | Path, url: str | None = None, sync: str = "FULL") -> None:
        """``url``: any SQLAlchemy URL; None means SQLite below ``root``. ``sync``: SQLite's synchronous.
        Raises NotTied if the database and the root do not belong together."""
        if url is None:
            Path(root).mkdir(parents=True, exist_ok=True)
        path = Path(root).absolute() / "journal.sqlite"
        torn = mend(path) if url is None else None
        if torn:
            _log.error("%s: %s; everything before it is kept", path, torn)
        damage = rescue(path) if url is None else None
        if damage:
            _log.error("%s is damaged: %s; the damaged file is kept beside it", path, damage)
        self._engine = _open(url or f"sqlite:///{path}", sync)
        try:
            METADATA.create_all(self._engine)
            with self._engine.begin() as connection:
                # Before the epoch: whose journal this is must not be fenced if it is somebody else's.
                is_used = torn or damage or connection.execute(sa.select(EPOCHS)).first() is not None
                tie(connection, "journal", path.parent / STATES, is_blank=not is_used)
                self.epoch = _next_epoch(connection)
        except BaseException:
            self._engine.dispose()
            raise
        # Of the payloads of all entries, those included that are still to be written. Changed on the event
        # loop only; what a transaction drops is taken off when it is done.
        self.num_bytes = 0
        self._dropping = 0  # by the transaction that runs; the writer's own
        self.stalled: str | None = None
        self._mine = EPOCHS.update().where(EPOCHS.c.epoch == self.epoch).values(epoch=self.epoch)
        self._queue: queue.SimpleQueue[tuple[Work | JournalEntry, Any] | None] = queue.SimpleQueue()
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
        return self._do(entry)

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
                SNAPSHOTS.insert().values({c.name: getattr(snapshot, c.name) for c in SNAPSHOTS.c})
            )
            self._drop_entries(connection, (ENTRIES.c.run_id == run_id) & (ENTRIES.c.seq_id <= drop_until))

        return self._do(work)

    def retire(self, run_id: str, results: Sequence[StoredResult]) -> asyncio.Future[None]:
        """Drop all of a run but ``results``: it is over."""

        def work(connection: sa.Connection) -> None:
            _store(connection, results)
            connection.execute(SNAPSHOTS.delete().where(SNAPSHOTS.c.run_id == run_id))
            self._drop_entries(connection, ENTRIES.c.run_id == run_id)

        return self._do(work)

    def expire_results(self, settled_before: float) -> asyncio.Future[None]:
        return self._do(
            lambda connection: connection.execute(
                RESULTS.delete().where(RESULTS.c.settled_at < settled_before)
            )
        )

    def drop_results(self, request_ids: Sequence[str]) -> asyncio.Future[None]:
        return self._do(lambda connection: _drop_results(connection, request_ids))

    def flush(self) -> asyncio.Future[None]:
        """Done when everything asked for before is on disk."""
        return self._do(lambda connection: None)

    # reading --------------------------------------------------------------------------------------

    def histories(self) -> dict[str, RunHistory]:
        """Everything, by run id; for the start, before anything is written."""
        with self._engine.connect() as connection:
            self.num_bytes = _num_bytes(connection)
            return read(connection)

    def history(self, run_id: str) -> asyncio.Future[RunHistory]:
        """One run's, with all that was asked for before."""
        return self._do(lambda connection: read(connection, run_id)[run_id])

    # the writer -----------------------------------------------------------------------------------

    def _do(self, job: Work | JournalEntry) -> asyncio.Future[Any]:
        """``job``: an entry to append, or what to do with a connection."""
        future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._queue.put((job, future))
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

    def _commit(self, jobs: Sequence[tuple[Work | JournalEntry, Any]]) -> None:
        """One transaction, tried until it succeeds: what was accepted must not be dropped because the
        disk is full, and nobody is told meanwhile that it is safe."""
        while True:
            self._dropping = 0
            try:
                with self._engine.begin() as connection:
                    self._check_epoch(connection)
                    answers = _run(connection, [job for job, _ in jobs])
                    reach("in journal")
                break
            except sa.exc.OperationalError as error:
                if self._closing:
                    return self._resolve(jobs, error=error)
                if self.stalled is None:
                    _log.error("the journal cannot be written: %s", error.orig)
                self.stalled = str(error.orig)
                time.sleep(_RETRY_S)
            except Exception as error:
                if len(jobs) == 1 or isinstance(error, Fenced):
                    return self._resolve(jobs, error=error)
                # One of them cannot be written; what others asked for must not fail with it.
                for job in jobs:
                    self._commit([job])
                return
        if self.stalled is not None:
            _log.warning("the journal can be written again")
            self.stalled = None
        self._resolve(jobs, answers=answers)

    def _check_epoch(self, connection: sa.Connection) -> None:
        """In each transaction, as its first write: so no other can open the journal until it ends."""
        if connection.execute(self._mine).rowcount != 1:
            raise Fenced("another coordinator has taken over")

    def _drop_entries(self, connection: sa.Connection, where: sa.ColumnElement[bool]) -> None:
        self._dropping += _num_bytes(connection, where)
        connection.execute(ENTRIES.delete().where(where))

    def _resolve(
        self,
        jobs: Sequence[tuple[Work | JournalEntry, Any]],
        answers: Sequence[Any] = (),
        error: Exception | None = None,
    ) -> None:
        futures = [future for _, future in jobs]
        unwritten = sum(len(job.payload) for job, _ in jobs if isinstance(job, JournalEntry))
        gone = self._dropping if error is None else unwritten

        def settle() -> None:
            self.num_bytes -= gone
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


def _run(connection: sa.Connection, jobs: Iterable[Work | JournalEntry]) -> list[Any]:
    """The answer of each, in order; rows that follow one another are one statement. Digests are made here and
    not where entries come from: a large payload would hold up the event loop."""
    answers: list[Any] = []
    for _, group in itertools.groupby(jobs, key=callable):
        some = list(group)
        rows = [row_of(job) for job in some if not callable(job)]
        if rows:
            connection.execute(_INSERT, rows)
        answers += [job(connection) if callable(job) else None for job in some]
    return answers


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
            # Damaged text must not stop the reading of what is whole.
            connection.text_factory = lambda text: text.decode(errors="replace")

    return engine


def _next_epoch(connection: sa.Connection) -> int:
    connection.execute(EPOCHS.update().values(epoch=EPOCHS.c.epoch + 1))
    epoch = connection.execute(sa.select(EPOCHS.c.epoch)).scalar()
    if epoch is None:
        connection.execute(EPOCHS.insert().values(id=1, epoch=1))
        return 1
    return int(epoch)


def _num_bytes(connection: sa.Connection, where: sa.ColumnElement[bool] | None = None) -> int:
    """What the payloads of entries take: of all, damaged ones included, or of some."""
    size = sa.select(sa.func.sum(sa.func.length(ENTRIES.c.payload)))
    return int(connection.execute(size if where is None else size.where(where)).scalar() or 0)


def _store(connection: sa.Connection, results: Sequence[StoredResult]) -> None:
    if not results:
        return
    _drop_results(connection, [result.request_id for result in results])
    connection.execute(RESULTS.insert(), [row_of(result) for result in results])


def _drop_results(connection: sa.Connection, ids: Sequence[str]) -> None:
    for start in range(0, len(ids), 500):
        connection.execute(RESULTS.delete().where(RESULTS.c.request_id.in_(ids[start : start + 500])))


def _drop_snapshots(connection: sa.Connection, run_id: str, covered: Collection[int]) -> None:
    mine = (SNAPSHOTS.c.run_id == run_id) & SNAPSHOTS.c.covered.in_(list(covered))
    connection.execute(SNAPSHOTS.delete().where(mine))
