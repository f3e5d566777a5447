"""What makes room in a full journal: of each run goes what is not needed for it to go on.

Knows which entries are superfluous once only one snapshot is kept. Does not know how a snapshot is taken or
listed (keeper.py).

Besides what no snapshot has yet, three things would stay for ever: entries that only an older snapshot
needs, of a run that nobody uses now; requests that failed without having been executed, as one before them
never came; and all that was asked of a run that has no adapter.
"""

from __future__ import annotations

import logging
from dataclasses import replace

from twinkle_serve.control.commands import RestoreCommand
from twinkle_serve.control.keeper import Keeper
from twinkle_serve.control.kept import UNBORN, Kept
from twinkle_serve.protocol.errors import CAPACITY, BackendUnavailable, Busy
from twinkle_serve.storage.journal_rows import StoredResult

logger = logging.getLogger(__name__)


def check_room(keeper: Keeper) -> None:
    """Raises BackendUnavailable while nothing more can be made durable; clients come again."""
    if keeper.journal.stalled is not None:
        raise BackendUnavailable(f"the journal cannot be written: {keeper.journal.stalled}")
    if keeper.is_full:
        for kept in list(keeper.kept.values()):
            _make_room(keeper, kept)
        raise BackendUnavailable("the journal is full; it empties as runs are snapshotted")


def check_disk(keeper: Keeper) -> None:
    """Raises Busy while the disk has no room for the snapshots of a run more; clients come again."""
    full = keeper.disk_is_full
    if full is not None:
        raise Busy(f"{full}; a new run starts once it has room", CAPACITY)


def _make_room(keeper: Keeper, kept: Kept) -> None:
    if kept.dirty_since is None and kept.covered < kept.executed < max(kept.unstored, default=UNBORN):
        kept.dirty_since = keeper.books.clock.now()  # only born, which is else no reason for a snapshot
    kept.is_urgent = kept.is_urgent or kept.dirty_since is not None
    if kept.is_persisting or kept.run.record.unloaded:
        return  # that makes room by itself
    if _is_of_no_use(keeper, kept):
        kept.is_persisting = True
        keeper.start(_forget(keeper, kept))
        return
    covered = _coverable(keeper, kept)
    if covered > kept.dropped_until and keeper.files.exists(kept.snapshots[0].file):
        kept.is_persisting = True
        keeper.start(_cover_again(keeper, kept, covered))


# runs without an adapter ------------------------------------------------------------------------------


def _is_of_no_use(keeper: Keeper, kept: Kept) -> bool:
    """The run has no adapter, and nothing is on its way that could bring it one. What is left of a corrupted
    one is for its rescue."""
    run = kept.run
    if run.wants_adapter or run.record.corrupted or kept.is_rewinding or keeper.is_in_tick(run):
        return False
    return not run.log.ready and _is_answered(keeper, kept)


async def _forget(keeper: Keeper, kept: Kept) -> None:
    """Keep the results and nothing else. With what comes for the run later, a checkpoint to load perhaps, its
    part of the journal begins anew."""
    unstored = dict(kept.unstored)
    try:
        results = await keeper.results(kept, max(unstored, default=UNBORN))
    finally:
        kept.is_persisting = False
    if _is_of_no_use(keeper, kept) and kept.unstored == unstored:
        logger.info("run %s has no adapter; the journal forgets what was asked of it", kept.run.run_id)
        del keeper.kept[kept.run.run_id]
        await keeper.drop(kept, results)


# all others -------------------------------------------------------------------------------------------


def _coverable(keeper: Keeper, kept: Kept) -> int:
    """Up to where the newest snapshot has all that was done, or ever will be. UNBORN while the run is on its
    way to it from the older one."""
    log = kept.run.log
    first = log.ready[0].command if log.ready else None
    waits = isinstance(first, RestoreCommand) and first.covered == kept.covered
    if not kept.snapshots or (kept.is_restoring and not waits):
        return UNBORN
    is_at_rest = len(log.ready) == int(waits) and kept.executed == kept.covered
    return log.next_number - 1 if is_at_rest and _is_answered(keeper, kept) else kept.covered


async def _cover_again(keeper: Keeper, kept: Kept, covered: int) -> None:
    """Let the newest snapshot be the only one, if nothing has come in between."""
    unstored = dict(kept.unstored)
    try:
        results = await keeper.results(kept, covered)
    finally:
        kept.is_persisting = False
    if _coverable(keeper, kept) == covered and kept.unstored == unstored:
        await _list_alone(keeper, kept, covered, results)


async def _list_alone(keeper: Keeper, kept: Kept, covered: int, results: list[StoredResult]) -> None:
    # As nothing else up to ``covered`` will be done, the file is that of the run up to there.
    newest, older = replace(kept.snapshots[0], covered=covered), kept.snapshots[1:]
    gone = [*kept.bad, *(snapshot.covered for snapshot in kept.snapshots)]
    kept.listed([newest], covered)
    if kept.is_restoring:
        kept.run.log.ready[0] = kept.restore_entry(keeper.files.path(newest.file))
    await keeper.journal.cover(newest, results, covered, gone)
    for snapshot in older:
        keeper.files.remove(snapshot.file)


def _is_answered(keeper: Keeper, kept: Kept) -> bool:
    log, promises = kept.run.log, keeper.books.promises
    pending = any(promises.is_pending(request_id) for request_id, _ in kept.unstored.values())
    return not pending and not log.parked and not log.is_held
