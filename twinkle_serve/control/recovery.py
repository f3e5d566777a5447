"""How runs come back: after their group died, and after this process did. One way for both.

A run is its newest whole snapshot and the commands after it, so recovery puts a RestoreCommand and those
commands in front of whatever its log still holds, and the tick loop does the rest. What was answered
stays answered; what was open is answered now. Knows logs, histories and promises. Does not know ticks.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace

from twinkle_serve.control.backend import RejectedCommand, SnapshotCommand
from twinkle_serve.control.codec import decode_command, decode_result
from twinkle_serve.control.commands import DoneCommand, RestoreCommand, RunCommand, RunEntry
from twinkle_serve.control.keeper import Keeper
from twinkle_serve.control.kept import UNBORN, Kept
from twinkle_serve.control.log import CommandLog, Entry
from twinkle_serve.control.runs import Run
from twinkle_serve.control.telling import read_note
from twinkle_serve.protocol.work import Failure
from twinkle_serve.storage.journal_rows import (
    COMMAND,
    GAP,
    VOID,
    DamagedEntry,
    JournalEntry,
    RunHistory,
    StoredResult,
)
from twinkle_serve.storage.records import RunRecord, SamplerRecord

logger = logging.getLogger(__name__)
_LOST = Failure("the workers died that held this run's adapter; load one of its checkpoints", "server")
_UNLOADED = Failure("the workers died while they did this, and the run was unloaded meanwhile", "server")


# after the group died ---------------------------------------------------------------------------------


async def rewind(keeper: Keeper, run: Run) -> None:
    """Nothing is left of the run in the group: what was done since its snapshot is to be done again."""
    kept = keeper.kept.get(run.run_id)
    if kept is not None and run.record.unloaded:
        return _end_of_unloaded(keeper, kept)
    if kept is None or run.record.corrupted or run.log.is_held:
        return  # what holds the log is fall_back, which does the same
    await _rewind(keeper, kept)


def _end_of_unloaded(keeper: Keeper, kept: Kept) -> None:
    """What the group was still doing for the run when it died is not done again."""
    waiting = {entry.request_id for entry in kept.run.log.ready}
    for request_id, _ in kept.unstored.values():
        was_at_work = request_id not in waiting and not kept.is_untold(request_id)
        if was_at_work and keeper.books.promises.is_pending(request_id):
            keeper.books.fail(request_id, _UNLOADED)


async def _rewind(keeper: Keeper, kept: Kept) -> None:
    run = kept.run
    if not kept.snapshots and not kept.done:
        return  # its birth is still to come
    kept.is_rewinding = True
    # A snapshot either is on its way to the journal now, and counts before ``_known`` returns, or will never
    # count.
    kept.num_rewinds += 1
    kept.untold = None
    try:
        known = await _known(keeper, kept)
    finally:
        kept.is_rewinding = False
    # Only now is it sure what is to be done again: a snapshot may have been listed meanwhile.
    redo = kept.to_redo
    skipped = _skip_covered(kept)
    if any(seq_id not in known for seq_id in redo):
        corrupt(keeper, run, "the journal does not hold all that was done since its last snapshot")
        return
    entries = [known[seq_id] for seq_id in redo]
    if kept.snapshots:
        entries = [kept.restore_entry(keeper.files.path(kept.snapshots[0].file)), *entries]
        run.down = None
    elif redo[:1] == [0]:
        run.await_adapter()
    elif run.down is None:
        run.down = _LOST  # what follows may load a checkpoint again
    kept.done = [*(seq_id for seq_id in kept.done if seq_id <= kept.covered), *skipped]
    kept.debt_s = 0.0
    run.log.rewind(entries)
    logger.warning("run %s: %d requests since its last snapshot are done again", run.run_id, len(redo))


def _skip_covered(kept: Kept) -> list[int]:
    """Take out of the log what an earlier recovery has put there and the newest snapshot has."""
    ready, skipped = kept.run.log.ready, []
    while ready and (isinstance(ready[0].command, RestoreCommand) or ready[0].seq_id <= kept.covered):
        entry = ready.popleft()
        if not isinstance(entry.command, RestoreCommand):
            skipped.append(entry.seq_id)
    return skipped


async def fall_back(keeper: Keeper, run: Run, held: Sequence[RunEntry], reason: str) -> None:
    """The newest snapshot could not be restored: now it can perhaps, or the one before it has taken its
    place. ``held``: what is to follow."""
    kept = keeper.kept[run.run_id]
    if kept.snapshots or kept.done[:1] == [0]:
        await _rewind(keeper, kept)
    else:
        corrupt(keeper, run, f"its snapshots cannot be read: {reason}")
    # A snapshot that was listed since may have some of them.
    run.log.ready.extend(entry for entry in held if entry.seq_id > kept.covered)
    run.log.go_on(keeper.books.clock.now())


def corrupt(keeper: Keeper, run: Run, reason: str) -> None:
    """Refuse to guess: the run is marked, and everything that is asked of it fails with the reason."""
    logger.error("run %s is corrupted: %s", run.run_id, reason)
    run.record = replace(run.record, corrupted=True)
    run.down = _corrupted(run, reason)
    kept = keeper.kept.get(run.run_id)
    if kept is not None:
        kept.untold = None
        for request_id, _ in kept.unstored.values():
            keeper.books.fail(request_id, run.down)
    try:
        keeper.books.runs.save(run)
    except Exception:  # the next start finds the same, and whoever waits must not hang for a full disk
        logger.exception("that run %s is corrupted could not be written down", run.run_id)


def _corrupted(run: Run, reason: str) -> Failure:
    return Failure(f"run {run.run_id} could not be recovered: {reason}", "server")


async def _known(keeper: Keeper, kept: Kept) -> dict[int, RunEntry]:
    """What the journal has for the part that is to be redone, by seq_id."""
    if not kept.to_redo:
        return {}
    history = await keeper.journal.history(kept.run.run_id)
    found: dict[int, RunEntry] = {}
    for entry in history.entries:
        if entry.kind == COMMAND:
            found.setdefault(entry.seq_id, Entry(entry.seq_id, entry.request_id, _decoded(kept, entry)))
    return found


def _decoded(kept: Kept, entry: JournalEntry) -> RunCommand:
    noted = kept.noted.get(entry.request_id)
    if noted is None:
        return decode_command(entry.payload)
    return DoneCommand(noted.value) if noted.failure is None else RejectedCommand(noted.failure)


def suspend_snapshots(keeper: Keeper, group: str) -> None:
    """Nobody may sample from what the group had before it is known where that is now."""
    for sampler in keeper.books.samplers.with_snapshot():
        if sampler.group == group and not sampler.evicted:
            keeper.books.samplers.relocate(sampler, None, awaited=True)


def relocate_snapshots(keeper: Keeper, group: str) -> None:
    """Where the sampling snapshots of a group's runs are now that it has none of them."""
    samplers = keeper.books.samplers
    for sampler in samplers.with_snapshot():
        record = sampler.record
        if sampler.group == group:
            name = keeper.sampler_file(record.sampler_id)
            path = keeper.files.path(name) if keeper.files.exists(name) else None
            samplers.relocate(sampler, path, _will_be_made(keeper, record))


def _will_be_made(keeper: Keeper, record: SamplerRecord) -> bool:
    run = keeper.books.runs.find(record.run_id or "")
    return run is not None and any(
        isinstance(entry.command, SnapshotCommand) and entry.seq_id == record.seq_id
        for entry in run.log.ready
    )


# after this process died ------------------------------------------------------------------------------


def restore(keeper: Keeper) -> list[Run]:
    """Take in what the journal remembers, before anything new comes. Returns the runs that came back."""
    histories = keeper.journal.histories()
    _attribute(keeper, histories)
    _restore_results(keeper, histories)
    keep, runs = [], []
    for run_id, history in histories.items():
        keep += [snapshot.file for snapshot in history.snapshots]
        run = keeper.books.runs.find(run_id)
        if run is None:
            logger.error("the journal has rows of a run %r that does not exist", run_id)
        elif history.entries or history.snapshots or history.damaged:
            _restore_run(keeper, run, history)
            runs.append(run)
    for record in (sampler.record for sampler in keeper.books.samplers.with_snapshot()):
        owner = keeper.books.runs.find(record.run_id or "")
        if owner is None or not owner.record.unloaded:
            keep.append(keeper.sampler_file(record.sampler_id))
    keeper.files.sweep(keep)
    return runs


def _attribute(keeper: Keeper, histories: dict[str, RunHistory]) -> None:
    """An entry may be damaged in the very name of its run: it belongs to the one that is called almost so."""
    known = [run_id for run_id in histories if keeper.books.runs.find(run_id) is not None]
    for run_id, history in histories.items():
        if history.damaged and run_id not in known:
            for near in (each for each in known if _differ_in_one(each, run_id)):
                histories[near].damaged += [DamagedEntry(request_id=d.request_id) for d in history.damaged]


def _differ_in_one(one: str, other: str) -> bool:
    return len(one) == len(other) and sum(a != b for a, b in zip(one, other, strict=True)) == 1


def has_work(run: Run) -> bool:
    """Whether the group should see the run now: one that is only to be restored comes when it is needed."""
    return any(not isinstance(entry.command, RestoreCommand) for entry in run.log.ready)


def _restore_results(keeper: Keeper, histories: dict[str, RunHistory]) -> None:
    results = [result for history in histories.values() for result in history.results]
    for result in sorted(results, key=lambda result: result.settled_at):
        run = keeper.books.runs.find(result.run_id)
        if run is not None:
            _restore_result(keeper, run, result)


def _restore_result(keeper: Keeper, run: Run, result: StoredResult) -> None:
    promises = keeper.books.promises
    seq_id = result.seq_id if result.numbered else None
    promises.reopen(result.request_id, run.tenant, ("run", run.run_id, seq_id))
    value, failure = decode_result(result.payload)
    if failure is not None:
        promises.fail(result.request_id, failure, result.settled_at)
    else:
        promises.resolve(result.request_id, value, result.settled_at, len(result.payload))
    _remember(keeper, run, result.seq_id, result.request_id, result.numbered)


def _remember(keeper: Keeper, run: Run, seq_id: int, request_id: str, numbered: bool) -> None:
    """Recognise the request when it comes again."""
    if seq_id == 0:
        session = keeper.books.sessions.get(run.tenant, run.record.session_id)
        session.models[run.record.model_seq_id] = (run.run_id, request_id)
    elif numbered:
        run.log.remember(seq_id, request_id)


def _restore_run(keeper: Keeper, run: Run, history: RunHistory) -> None:
    # With a damaged row only the newest snapshot may still be followed by all that came after it.
    snapshots = history.snapshots[: 1 if history.damaged else 2]
    kept = Kept(run, snapshots=snapshots, dropped_until=_before_first(history))
    keeper.kept[run.run_id] = kept
    # Its unload is among the entries, or it would have been retired; until then it is alive.
    run.record = _alive(run.record)
    run.log = _replayed_log(keeper, kept, run.log, history)
    if any(_may_matter(damaged, history, kept.covered) for damaged in history.damaged):
        corrupt(keeper, run, "what it was asked to do is damaged in the journal")
        for damaged in history.damaged:
            _fail_damaged(keeper, run, damaged.request_id)
    if run.record.corrupted:
        run.down = _corrupted(run, "it is damaged")
        return
    while run.log.ready and run.log.ready[0].seq_id <= kept.covered:
        entry = run.log.ready.popleft()
        kept.done.append(entry.seq_id)
        if keeper.books.promises.is_pending(entry.request_id):
            # Its result was kept for its time and is gone; nobody will make it again.
            keeper.books.promises.lose(entry.request_id, keeper.books.clock.now())
            kept.unstored.pop(entry.seq_id, None)
    if kept.snapshots:
        run.down = None
        run.log.rewind([kept.restore_entry(keeper.files.path(kept.snapshots[0].file))])


def _may_matter(damaged: DamagedEntry, history: RunHistory, covered: int) -> bool:
    """Whether it may be one that no snapshot has. Its seq_id says so, if that can be trusted: it fits behind
    the entry before it, or something that is covered came later."""
    if damaged.seq_id is None or damaged.seq_id > covered:
        return True
    start = history.snapshots[-1].covered if history.snapshots else UNBORN
    earlier = [entry.seq_id for entry in history.entries[: damaged.after] if entry.kind != VOID]
    later = [entry.seq_id for entry in history.entries[damaged.after :] if entry.kind != VOID]
    fits = damaged.seq_id == (earlier[-1] if earlier else start) + 1
    return not fits and all(seq_id > covered for seq_id in later)


def _fail_damaged(keeper: Keeper, run: Run, request_id: str) -> None:
    """Whoever waits for it should read why."""
    promises = keeper.books.promises
    if request_id and not promises.is_pending(request_id) and promises.settled(request_id) is None:
        promises.reopen(request_id, run.tenant, ("run", run.run_id, None))
        assert run.down is not None
        keeper.books.fail(request_id, run.down)


def _replayed_log(
    keeper: Keeper, kept: Kept, blank: CommandLog[RunCommand], history: RunHistory
) -> CommandLog[RunCommand]:
    """The log as it was: a log is what came, in the order in which it came, and nothing else."""
    kept.noted.update({entry.request_id: read_note(entry) for entry in history.entries if entry.kind == VOID})
    start = kept.snapshots[-1].covered if kept.snapshots else _before_first(history)
    log = blank.restarted(max(start, 0) + 1)
    for entry in history.entries:
        if entry.kind == GAP:
            failures = log.give_up()
        elif entry.kind == COMMAND and entry.seq_id > start:
            failures = _take_in(keeper, kept, log, entry)
        else:
            continue
        for request_id, failure in failures:
            keeper.books.fail(request_id, failure)
    return log


def _before_first(history: RunHistory) -> int:
    """Without a snapshot a log begins with the birth of its run, or with what came first after the journal
    had forgotten a run that had no adapter."""
    numbers = [entry.seq_id for entry in history.entries if entry.kind == COMMAND]
    return min(numbers, default=0) - 1


def _take_in(
    keeper: Keeper, kept: Kept, log: CommandLog[RunCommand], entry: JournalEntry
) -> list[tuple[str, Failure]]:
    run, request_id = kept.run, entry.request_id
    if keeper.books.promises.settled(request_id) is None:
        seq_id = entry.seq_id if entry.numbered else None
        keeper.books.promises.reopen(request_id, run.tenant, ("run", run.run_id, seq_id))
        kept.unstored.setdefault(entry.seq_id, (request_id, entry.numbered))
    _remember(keeper, run, entry.seq_id, request_id, entry.numbered)
    command = _decoded(kept, entry)
    if entry.seq_id == 0:  # its birth, or what is noted of that
        log.prepend(request_id, command)
        return []
    failure = log.append(entry.seq_id if entry.numbered else None, request_id, command, entry.accepted_at)
    return [] if failure is None else [(request_id, failure)]


def _alive(record: RunRecord) -> RunRecord:
    return replace(record, unloaded=False)
