"""What makes accepted training survive: the journal is written, runs are snapshotted, both are kept in step.

Knows which commands of a run are on disk, done, and covered by a snapshot. Does not know how a snapshot is
written (the group does), what rows look like (storage/journal.py), or how a lost run comes back
(recovery.py).

The rule that everything here serves: at any moment the newest listed snapshot of a run, followed by the
run's journal entries above it in the order of their execution, is the run; and each promise below it has
its result kept. So a snapshot is listed in one transaction with the results it makes impossible to
compute again, and of two kept snapshots the older still has all entries that follow it. Only in a full
journal, and after a load (telling.py), there is but one, and entries above it.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter, defaultdict
from collections.abc import Callable, Coroutine, Mapping
from typing import Any

from twinkle_serve.config import StorageConfig
from twinkle_serve.control.backend import LoadCommand, OptimCommand, Poll, UnloadCommand
from twinkle_serve.control.books import Books
from twinkle_serve.control.clock import Timer
from twinkle_serve.control.codec import encode_command, encode_result
from twinkle_serve.control.commands import BirthCommand, RestoreCommand, RunCommand, RunEntry, num_tokens
from twinkle_serve.control.durability import Durability
from twinkle_serve.control.flights import Flight
from twinkle_serve.control.kept import UNBORN, Kept, due
from twinkle_serve.control.runs import Run
from twinkle_serve.protocol.errors import BackendUnavailable
from twinkle_serve.protocol.work import Failure, PersistRun
from twinkle_serve.storage.journal import Fenced
from twinkle_serve.storage.journal_rows import GAP, JournalEntry, StoredResult, StoredSnapshot

logger = logging.getLogger(__name__)
_PATIENCE_S = 10.0
_RETRY_S = 30.0
_LONGEST_RETRY_S = 3600.0
_SETTLE_POLL_S = 0.05
_EXPIRE_EVERY_S = 60.0
_LISTED_SOON = "what was loaded is being written to disk; the run goes on as soon as it is there"
_NOT_LISTED = "what was loaded cannot be written to the server's disk at the moment; it is tried again"


class Keeper:
    """One per control plane; everything runs on its event loop."""

    def __init__(
        self,
        books: Books,
        durability: Durability,
        config: StorageConfig,
        retention_s: float,
        new_token: Callable[[], str],
    ) -> None:
        self.books = books
        self.journal = durability.journal
        self.files = durability.files
        self.kept: dict[str, Kept] = {}
        self.parked: Callable[[Run], object] = lambda run: None
        self.wakes: dict[str, Callable[[], object]] = {}  # by group: let it plan again
        self.unreadable: Callable[[Run, list[RunEntry], str], Coroutine[Any, Any, None]]
        self._resolve = durability.resolve
        self._fenced = durability.fenced
        self._config = config
        self._retention_s = retention_s
        self._new_token = new_token
        self._writing: dict[str, asyncio.Future[None]] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._retries: dict[str, Timer] = {}  # of restores, by run
        self._expired_at = 0.0
        # Of the tick that runs, by group: how much work each run has in it, and who is snapshotted.
        self._work: dict[str, Counter[str]] = defaultdict(Counter)
        self._held: dict[str, list[Kept]] = defaultdict(list)

    @property
    def oldest_unwritten(self) -> str | None:
        """The request that has been waiting longest to get to disk."""
        return next(iter(self._writing), None)

    def oldest_change(self, group: str) -> float | None:
        """When the oldest change of one of the group's runs was made that no snapshot has, POSIX seconds. Of
        a run without an adapter there is nothing to snapshot."""
        runs = (k for k in self.kept.values() if k.run.group == group and k.run.down is None)
        return min((k.dirty_since for k in runs if k.dirty_since is not None), default=None)

    def find(self, request_id: str) -> Kept | None:
        """What is kept of the run that a request belongs to, if it does to one."""
        return self.kept.get(self.books.promises.run_of(request_id) or "")

    def kept_of(self, request_id: str) -> Kept:
        kept = self.find(request_id)
        assert kept is not None
        return kept

    # accepting ------------------------------------------------------------------------------------

    @property
    def is_full(self) -> bool:
        """Whether the journal is above its limit (room.py)."""
        return self.journal.num_bytes > self._config.journal_max_bytes

    def no_room_for_a_save(self) -> Failure | None:
        """Why no further checkpoint may be written now. The last of the disk is for the journal and the
        snapshots, without which nobody could train on."""
        used, limit = self.books.checkpoints.num_bytes, self._config.checkpoints_max_bytes
        if used >= limit:
            return Failure(
                f"all checkpoints on this server take {used} bytes, and storage.checkpoints_max_bytes is "
                f"{limit}; nothing was saved; delete some",
                "server",
            )
        full = self.disk_is_full
        return None if full is None else Failure(f"{full}; nothing was saved", "server")

    @property
    def disk_is_full(self) -> str | None:
        """Why nothing may be begun that takes room for good: None while there is enough."""
        free, reserve = self.files.free_bytes(), self._config.disk_reserve_bytes
        if free >= reserve:
            return None
        return (
            f"the server's disk is full ({free} bytes are left, and storage.disk_reserve_bytes is {reserve})"
        )

    def accept(self, run: Run, seq_id: int, request_id: str, command: RunCommand, numbered: bool) -> None:
        """Begin to write a command down. It may be executed meanwhile, but nobody may be told that it was
        accepted before ``durable``: a snapshot that has it is listed by the same writer, later."""
        kept = self.kept.setdefault(run.run_id, Kept(run))
        kept.is_parking = False
        kept.unstored.setdefault(seq_id, (request_id, numbered))
        payload = encode_command(command)
        now = self.books.clock.now()
        future = self.journal.append(JournalEntry(run.run_id, seq_id, request_id, payload, now, numbered))
        self._writing[request_id] = future
        future.add_done_callback(lambda done: self._written(request_id, done))

    def _written(self, request_id: str, future: asyncio.Future[None]) -> None:
        # One that could not be written stays, so that a client who comes again is not told that it is safe.
        if not future.cancelled() and future.exception() is None:
            self._writing.pop(request_id, None)

    async def durable(self, request_id: str) -> None:
        """Returns once the request is on disk. Raises BackendUnavailable if that takes too long or cannot be
        done: the client comes again with the same seq_id and finds the request it made."""
        future = self._writing.get(request_id)
        if future is None:
            return
        await asyncio.wait({future}, timeout=_PATIENCE_S)
        if not future.done():
            raise BackendUnavailable(f"the journal cannot be written: {self.journal.stalled or 'busy'}")
        try:
            future.result()
        except Fenced as error:
            self._fenced()
            raise BackendUnavailable(str(error)) from None
        except Exception as error:
            logger.error("request %s is not in the journal: %s", request_id, error)
            raise BackendUnavailable("the journal cannot hold this request") from None

    async def still_ours(self) -> None:
        """Returns unless another coordinator has taken over: then what this one would write or say is not to
        be believed, and it stands still until it is ended."""
        future = self.journal.flush()
        await asyncio.wait({future}, timeout=_PATIENCE_S)
        if future.done() and isinstance(future.exception(), Fenced):
            self._fenced()
            await asyncio.Future()

    def gave_up(self, run: Run, last_seq_id: int) -> None:
        """The run's log went on behind a gap; after a restart it must do so at the same place."""
        now = self.books.clock.now()
        self.journal.append(JournalEntry(run.run_id, last_seq_id, "", b"", now, kind=GAP))

    # ticks ----------------------------------------------------------------------------------------

    def executed(self, run: Run, entry: RunEntry) -> None:
        """The command is in the tick that comes next."""
        kept = self.kept[run.run_id]
        if isinstance(entry.command, RestoreCommand):
            return
        kept.done.append(entry.seq_id)
        if isinstance(entry.command, BirthCommand) and entry.command.path is None:
            # Doing it again costs no more than reading a snapshot, and a thousand runs that nobody has
            # trained yet would all be written to disk, one by one.
            return
        self._work[run.group][run.run_id] += 1 + num_tokens(entry.command)
        if kept.dirty_since is None and entry.seq_id > kept.covered:
            kept.dirty_since = self.books.clock.now()
        match entry.command:
            case OptimCommand():
                kept.num_steps += 1
            case LoadCommand() | BirthCommand(path=str()):
                # Its client is answered, and its run goes on, once a snapshot has it: that is tried at once,
                # even if one has failed just now.
                kept.is_urgent, kept.not_before = True, 0.0

    def is_in_tick(self, run: Run) -> bool:
        """Whether something of the run is in the tick that runs."""
        return run.group in self._work and self._work[run.group][run.run_id] > 0

    def is_unsure(self, run: Run, command: RunCommand) -> bool:
        """Whether ``command`` has to wait: the run has done a load that no snapshot has yet, or a failure of
        it is not on disk. An unload needs no snapshot, and makes room where there is none for one."""
        kept = self.kept.get(run.run_id)
        if kept is None:
            return False
        is_loaded = kept.untold is None or isinstance(command, UnloadCommand)
        return not is_loaded or kept.noting is not None

    def reason_to_wait(self, run: Run, seq_id: int | None) -> str | None:
        """Why a request of the run is not told, or waits, though nothing is in front of it; for a client."""
        kept = self.kept.get(run.run_id)
        if kept is None or kept.untold is None or (seq_id is not None and seq_id < kept.untold.seq_id):
            return None
        return _NOT_LISTED if kept.not_before > 0 else _LISTED_SOON  # the load has set it to 0

    def ticked(self, group: str, seconds: Mapping[str, float]) -> None:
        """The tick is over, and took so long by phase; nothing if that is not known, or if there was none."""
        work, held = self._work.pop(group, Counter()), self._held.pop(group, [])
        spent = sum(seconds.get(phase, 0.0) for phase in ("move", "passes", "optim"))
        for run_id, share in work.items():
            if run_id in self.kept:
                self.kept[run_id].debt_s += spent * share / work.total()
        for kept in held:
            kept.hold_s = seconds.get("save", 0.0) / len(held)

    def due(self, group: str) -> list[str]:
        """The runs of a group that should be snapshotted at the end of the coming tick."""
        # Asked in every tick, so that the many runs that nobody uses must cost next to nothing.
        changed = (k for k in self.kept.values() if k.debt_s or k.dirty_since is not None)
        runs = [kept for kept in changed if kept.run.group == group]
        return due(runs, self._config, self.books.clock.now())

    def persist(self, run_id: str, slot: int | None) -> tuple[PersistRun, Flight]:
        """The order to snapshot a run, and what becomes of its outcome."""
        kept = self.kept[run_id]
        covered, num_rewinds = kept.executed, kept.num_rewinds
        name = self.files.name_for(run_id, f"{covered}.{self._new_token()}")
        request_id = f"persist {name}"
        kept.begin_snapshot()
        self._held[kept.run.group].append(kept)

        def written(num_bytes: int) -> None:
            snapshot = StoredSnapshot(run_id, covered, name, num_bytes, self.books.clock.now())
            self.start(self._list(kept, snapshot, num_rewinds))

        def failed(failure: Failure) -> None:
            logger.error("run %s is not snapshotted: %s", run_id, failure.message)
            self._not_persisted(kept)
            self.files.remove(name)

        def lost() -> None:
            kept.is_persisting = False

        flight = Flight(request_id, written, failed, lost, outlives_tick=True)
        return PersistRun(request_id, run_id, slot, self.files.path(name)), flight

    async def _list(self, kept: Kept, snapshot: StoredSnapshot, num_rewinds: int) -> None:
        """Make a written snapshot count. num_rewinds: as it was when the snapshot was ordered; the group may
        die before this has begun to run."""
        try:
            await self._settled(kept, snapshot.covered, _RETRY_S)
            results = await self.results(kept, snapshot.covered)
            if self._is_gone(kept) or kept.num_rewinds > num_rewinds:
                # A row would bring a dead run back to life, or contradict what is done again: a load may
                # find something else, and what failed may succeed.
                self._discard(kept, snapshot)
                return
            untold = kept.untold_until(snapshot.covered)
            # On its way from the older one the run still needs that. Across a load there is no way back.
            alone = untold is not None or (self.is_full and not kept.is_restoring)
            older = [] if alone else kept.snapshots[:1]
            dropped = kept.snapshots[len(older) :]
            drop_until = snapshot.covered if alone else older[0].covered if older else UNBORN
            gone = [*kept.bad, *(old.covered for old in dropped)]
            await self.journal.cover(snapshot, results, drop_until, gone)
        except Fenced:
            self._fenced()
            return
        except Exception as error:
            logger.warning("the snapshot of run %s is not listed: %s", snapshot.run_id, error)
            self.files.remove(snapshot.file)
            self._not_persisted(kept)
            return
        if older and older[0].covered == snapshot.covered:
            dropped, older = [*dropped, *older], []
        # All of them are settled; what is not among the results nobody can ask for any more.
        kept.listed([snapshot, *older], drop_until)
        kept.is_persisting = False
        if untold is not None:
            kept.untold = None
            self.books.resolve(untold.request_id, untold.value)
        # One that the run is on its way from goes at the next start.
        for old in () if kept.is_restoring else dropped:
            self.files.remove(old.file)
        self._park_if_clean(kept)
        self.wake(kept)

    def _discard(self, kept: Kept, snapshot: StoredSnapshot) -> None:
        self.files.remove(snapshot.file)
        kept.is_persisting = False
        self.wake(kept)

    def wake(self, kept: Kept) -> None:
        """The run may go on, or be snapshotted again."""
        self.wakes.get(kept.run.group, lambda: None)()

    def _is_gone(self, kept: Kept) -> bool:
        """Whether the run was unloaded or forgotten meanwhile."""
        return kept.run.record.unloaded or self.kept.get(kept.run.run_id) is not kept

    async def _settled(self, kept: Kept, until: int, patience_s: float | None) -> None:
        """Wait for the answers up to ``until``: a save that is still being written could not be done again
        from a later state. A load waits for the snapshot itself. Raises TimeoutError."""
        async with asyncio.timeout(patience_s):
            while any(
                self.books.promises.is_pending(request_id) and not kept.is_untold(request_id)
                for seq_id, (request_id, _) in kept.unstored.items()
                if seq_id <= until
            ):
                await asyncio.sleep(_SETTLE_POLL_S)

    def _not_persisted(self, kept: Kept) -> None:
        now = self.books.clock.now()
        kept.is_persisting = False
        kept.dirty_since = now if kept.dirty_since is None else kept.dirty_since
        kept.is_urgent = True
        kept.not_before = now + _RETRY_S

    async def results(self, kept: Kept, until: int) -> list[StoredResult]:
        """What the promises up to ``until`` were settled with, for those that can still be asked for."""
        results = []
        for seq_id, (request_id, numbered) in sorted(kept.unstored.items()):
            settled = self._answer(kept, request_id) if seq_id <= until else None
            if settled is not None:
                value = await self._resolve(settled.value)
                payload = encode_result(value, settled.failure)
                now = self.books.clock.now()
                results.append(StoredResult(kept.run.run_id, seq_id, request_id, payload, now, numbered))
        return results

    def _answer(self, kept: Kept, request_id: str) -> Poll | None:
        if kept.untold is not None and kept.is_untold(request_id):
            return Poll("done", kept.untold.value)
        return self.books.promises.settled(request_id)

    def restored(self, run: Run) -> None:
        kept = self.kept[run.run_id]
        kept.is_restoring, kept.num_failed_restores = False, 0

    def damaged(self, run: Run, covered: int, reason: str) -> None:
        """The file is of no use: nothing of the run may be done until an older one is in its place."""
        logger.error("the snapshot of run %s at %d is of no use: %s", run.run_id, covered, reason)
        kept = self.kept[run.run_id]
        kept.is_restoring = False
        kept.bad.append(covered)
        kept.snapshots = [snapshot for snapshot in kept.snapshots if snapshot.covered != covered]
        self.start(self.unreadable(run, run.log.hold(), reason))

    def not_restored(self, run: Run, reason: str) -> None:
        """The file may be fine, but a disk is away or the configuration does not let the run in: all that was
        accepted waits, and it is tried again, less and less often."""
        kept = self.kept[run.run_id]
        delay = min(_RETRY_S * 2**kept.num_failed_restores, _LONGEST_RETRY_S)
        kept.num_failed_restores += 1
        logger.error("run %s is not restored, next try in %g s: %s", run.run_id, delay, reason)
        held = run.log.hold()
        self._retries[run.run_id] = self.books.clock.call_later(
            delay, lambda: self.start(self.unreadable(run, held, reason))
        )

    # idle and finished runs -----------------------------------------------------------------------

    def park(self, run: Run) -> None:
        """Nobody is there for this run: free its slot as soon as a snapshot has everything."""
        kept = self.kept.get(run.run_id)
        if kept is not None and run.down is None and not kept.is_restoring:
            kept.is_parking = kept.is_urgent = True
            if kept.dirty_since is None and kept.executed > kept.covered:
                kept.dirty_since = self.books.clock.now()
            self._park_if_clean(kept)

    def _park_if_clean(self, kept: Kept) -> None:
        if kept.is_parking and kept.covered == kept.executed and not kept.run.log.ready:
            kept.is_parking = kept.is_urgent = False
            kept.dirty_since = None
            kept.run.log.rewind([kept.restore_entry(self.files.path(kept.snapshots[0].file))])
            self.parked(kept.run)

    def retire(self, run: Run) -> None:
        """The run was unloaded: once its last promises are settled, only their results are kept."""
        kept = self.kept.get(run.run_id)
        if kept is not None:
            self.start(self._retire(kept))

    async def _retire(self, kept: Kept) -> None:
        run_id = kept.run.run_id
        last = max(kept.unstored, default=UNBORN)
        await self._settled(kept, last, patience_s=None)
        results = await self.results(kept, last)
        await self.drop(kept, results)
        self.kept.pop(run_id, None)
        if kept.untold is not None:  # its result is on disk now, and no snapshot will come
            self.books.resolve(kept.untold.request_id, kept.untold.value)

    async def drop(self, kept: Kept, results: list[StoredResult]) -> None:
        """Let ``results`` be all that is left of the run on disk."""
        await self.journal.retire(kept.run.run_id, results)
        for snapshot in kept.snapshots:
            self.files.remove(snapshot.file)

    def sampler_file(self, sampler_id: str) -> str:
        return self.files.name_for(sampler_id, "frozen")

    def path_of_sampler(self, sampler_id: str) -> str | None:
        """The file that a snapshot was written to, once it is there."""
        name = self.sampler_file(sampler_id)
        return self.files.path(name) if self.files.exists(name) else None

    def sweep(self) -> None:
        now = self.books.clock.now()
        if now - self._expired_at >= _EXPIRE_EVERY_S:
            self._expired_at = now
            self.journal.expire_results(now - self._retention_s)
        dropped = self.books.promises.take_dropped()
        if dropped:
            self.journal.drop_results(dropped)

    # tasks ----------------------------------------------------------------------------------------

    def start(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def close(self, timeout_s: float) -> None:
        """Wait for what is being listed, then give it up."""
        for timer in self._retries.values():
            timer.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=timeout_s)
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
