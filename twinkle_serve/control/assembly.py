"""Turns planned commands into one Tick, and says what each outcome will mean.

Knows runs, names, slots and checkpoint directories. Does not know when ticks run or who waits.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

from twinkle_serve.control.backend import (
    Invalid,
    LoadCommand,
    NotFound,
    OptimCommand,
    PassCommand,
    RejectedCommand,
    SaveCommand,
    SnapshotCommand,
    UnloadCommand,
)
from twinkle_serve.control.books import Books
from twinkle_serve.control.checkpoints import check_ttl, key_of, path_of
from twinkle_serve.control.commands import BirthCommand, RestoreCommand, RunEntry
from twinkle_serve.control.flights import INTERNAL_ERROR, Assembly, Flight
from twinkle_serve.control.keeper import Keeper
from twinkle_serve.control.microbatches import pack
from twinkle_serve.control.planner import Window
from twinkle_serve.control.residency import Placement, Residency
from twinkle_serve.control.runs import Run
from twinkle_serve.control.samplers import sampler_id_for
from twinkle_serve.protocol.data import LoraSpec
from twinkle_serve.protocol.errors import UserError
from twinkle_serve.protocol.work import (
    CreateAdapter,
    DropRun,
    Failure,
    LoadAdapter,
    OptimStep,
    Outcome,
    Pass,
    RestoreRun,
    Sample,
    SaveAdapter,
    Snapshot,
    Tick,
)
from twinkle_serve.storage.records import CheckpointRecord, SamplerRecord

logger = logging.getLogger(__name__)
Place = Callable[[int], object]


class _Done(Exception):
    """A command that a recovered run needs no more, because its work outlived the group; its answer."""

    def __init__(self, value: Any) -> None:
        self.value = value


class _Refused(Exception):
    """A command that is not run, and the failure that its client gets."""

    def __init__(self, failure: Failure) -> None:
        self.failure = failure


class Assembler:
    """Makes the ticks of one group."""

    def __init__(
        self,
        group: str,
        books: Books,
        residency: Residency,
        microbatch_tokens: int,
        deterministic: bool,
        keeper: Keeper | None = None,
    ) -> None:
        self._group = group
        self._books = books
        self._residency = residency
        self._microbatch_tokens = microbatch_tokens
        self._deterministic = deterministic
        self._keeper = keeper
        self._drops: list[DropRun] = []
        self._num_ticks = 0

    def assemble(
        self,
        assembly: Assembly,
        window: Window,
        samples: Sequence[Sample] = (),
        cancels: Sequence[str] = (),
        decode_budget_s: float = 0.0,
        even_if_empty: bool = False,
    ) -> Tick | None:
        """The tick that does all this, or None if nothing needs the group. ``assembly`` is filled on the
        way, so that a failure in here leaves a list of who is affected."""
        placed = self._translate(assembly, window)
        drop_snapshots = self._evicted()
        placement = self._residency.place(list(placed))
        for run_id, places in placed.items():
            for place in places:
                place(placement.slots[run_id])
        assembly.drops, self._drops = [*self._drops, *assembly.drops], []
        self._persist(assembly)
        wanted = (placed, assembly.drops, assembly.persists, drop_snapshots, samples, cancels)
        if not any(wanted) and not even_if_empty:
            return None
        return self._tick(assembly, placement, drop_snapshots, samples, cancels, decode_budget_s)

    def park(self, run_id: str) -> None:
        """Free the run's slot; it is on disk and comes back from there."""
        drop = self._residency.drop(run_id)
        if drop is not None:
            self._drops.append(drop)

    def lose_all(self) -> None:
        """The group is gone: what it was still to drop is gone with it."""
        self._drops.clear()

    def _tick(
        self,
        assembly: Assembly,
        placement: Placement,
        drop_snapshots: Sequence[str],
        samples: Sequence[Sample],
        cancels: Sequence[str],
        decode_budget_s: float,
    ) -> Tick:
        self._num_ticks += 1
        return Tick(
            self._num_ticks,
            page_out=placement.page_out,
            drops=tuple(assembly.drops),
            page_in=placement.page_in,
            restores=tuple(assembly.restores),
            creates=tuple(assembly.creates),
            loads=tuple(assembly.loads),
            passes=tuple(assembly.passes),
            microbatches=pack(assembly.pass_loads, self._microbatch_tokens, self._deterministic),
            optim_steps=tuple(assembly.optim_steps),
            saves=tuple(assembly.saves),
            snapshots=tuple(assembly.snapshots),
            persists=tuple(assembly.persists),
            drop_snapshots=tuple(drop_snapshots),
            cancels=tuple(cancels),
            samples=tuple(samples),
            decode_budget_s=decode_budget_s,
        )

    def _evicted(self) -> list[str]:
        names = self._books.samplers.evict(self._group)
        if self._keeper is not None:
            for name in names:
                self._keeper.files.remove(self._keeper.sampler_file(name))
        return names

    def _persist(self, assembly: Assembly) -> None:
        """Let the runs whose time has come be written to disk as they are when this tick is over."""
        if self._keeper is None:
            return
        for run_id in self._keeper.due(self._group):
            if self._residency.knows(run_id):
                order, flight = self._keeper.persist(run_id, self._residency.slot_of(run_id))
                assembly.persists.append(order)
                assembly.flights[flight.request_id] = flight

    # commands -------------------------------------------------------------------------------------

    def _translate(self, assembly: Assembly, window: Window) -> dict[str, list[Place]]:
        """What to do for each run once its slot is known. Commands that cannot run become verdicts."""
        placed: dict[str, list[Place]] = {}
        for work in window.work:
            run = self._books.runs.find(work.run_id)
            assert run is not None
            for entry in work.entries:
                if self._keeper is not None:
                    self._keeper.executed(run, entry)
                if isinstance(entry.command, UnloadCommand):
                    self._unload(assembly, run, entry.request_id)
                    continue
                try:
                    place = self._command(assembly, run, entry)
                except _Done as done:
                    assembly.verdicts.append(Outcome(entry.request_id, done.value))
                except _Refused as refused:
                    assembly.verdicts.append(Outcome(entry.request_id, failure=refused.failure))
                except (UserError, Invalid, NotFound) as error:
                    assembly.verdicts.append(Outcome(entry.request_id, failure=Failure(str(error))))
                except Exception:
                    logger.exception("could not prepare request %s", entry.request_id)
                    assembly.verdicts.append(Outcome(entry.request_id, failure=INTERNAL_ERROR))
                else:
                    placed.setdefault(run.run_id, []).append(place)
        return placed

    def _command(self, assembly: Assembly, run: Run, entry: RunEntry) -> Place:
        command = entry.command
        request_id = entry.request_id
        if run.down is not None and run.record.unloaded:
            raise _Refused(run.down)
        match command:
            case RejectedCommand(failure):
                raise _Refused(failure)
            case RestoreCommand():
                return self._restore(assembly, run, request_id, command)
            case BirthCommand(path=None):
                return self._birth(assembly, run, request_id)
            case BirthCommand(path=str(path), optimizer=optimizer) | LoadCommand(path, optimizer):
                return self._load(assembly, run, request_id, path, optimizer)
        if run.down is not None:
            raise _Refused(run.down)
        match command:
            case PassCommand():
                return self._pass(assembly, request_id, command)
            case OptimCommand(params):
                assembly.flights[request_id] = Flight(request_id)
                return lambda slot: assembly.optim_steps.append(OptimStep(request_id, slot, params))
            case SaveCommand():
                return self._save(assembly, run, entry, command)
            case SnapshotCommand():
                return self._snapshot(assembly, run, entry, command)
        raise AssertionError(command)

    def _pass(self, assembly: Assembly, request_id: str, command: PassCommand) -> Place:
        assembly.flights[request_id] = Flight(request_id)

        def place(slot: int) -> None:
            assembly.passes.append(
                Pass(request_id, slot, command.datums, command.loss_fn, command.loss_config, command.backward)
            )
            assembly.lengths.append(command.lengths)

        return place

    def _birth(self, assembly: Assembly, run: Run, request_id: str) -> Place:
        assembly.flights[request_id] = Flight(
            request_id,
            lambda _: self._came_up(run, {"model_id": run.run_id}),
            lambda failure: self._stayed_down(run, failure),
        )
        spec = run.record.spec
        return lambda slot: assembly.creates.append(CreateAdapter(request_id, run.run_id, slot, spec))

    def _load(self, assembly: Assembly, run: Run, request_id: str, path: str, optimizer: bool) -> Place:
        """Into the run's adapter, or as its first one if it has none."""
        try:
            source = self._source(run, path, optimizer)
        except (UserError, Invalid, NotFound) as error:
            if run.down is not None:
                self._stayed_down(run, Failure(str(error)))
            raise
        checkpoints = self._books.checkpoints
        checkpoints.pin(source.directory)
        was_down = run.down is not None

        def loaded(_: Any) -> Any:
            checkpoints.unpin(source.directory)
            return self._came_up(run, {"model_id": run.run_id, "path": path})

        def failed(failure: Failure) -> None:
            checkpoints.unpin(source.directory)
            if was_down:
                self._stayed_down(run, failure)

        assembly.flights[request_id] = Flight(
            request_id, loaded, failed, lambda: checkpoints.unpin(source.directory)
        )
        directory = source.directory
        return lambda slot: assembly.loads.append(
            LoadAdapter(request_id, run.run_id, slot, directory, optimizer)
        )

    def _source(self, run: Run, path: str, optimizer: bool) -> CheckpointRecord:
        source = self._books.checkpoints.find(run.tenant, path)
        check_loadable(source, run.record.base_model, optimizer)
        if _shape(source.spec) != _shape(run.record.spec):
            raise UserError(
                f"path {path!r} holds an adapter of {_words(source.spec)}, "
                f"but this run has {_words(run.record.spec)}"
            )
        return source

    def _save(self, assembly: Assembly, run: Run, entry: RunEntry, command: SaveCommand) -> Place:
        check_ttl(command.ttl_seconds)
        name = f"checkpoint-{entry.seq_id:06d}" if command.name is None else command.name
        checkpoints = self._books.checkpoints
        earlier = checkpoints.at((run.run_id, command.kind, name))
        if earlier is not None and earlier.seq_id is not None and earlier.seq_id >= entry.seq_id:
            # Done before the group was lost, and maybe replaced since by a later request of the run.
            raise _Done({"path": path_of(key_of(earlier)), "size_bytes": earlier.size_bytes})
        if self._is_over(entry.request_id):
            raise _Done(None)  # deleted since
        no_room = None if self._keeper is None else self._keeper.no_room_for_a_save()
        if no_room is not None:
            raise _Refused(no_room)
        directory = checkpoints.reserve(run.run_id, command.kind, name, command.overwrite)
        now = self._books.clock.now()
        record = CheckpointRecord(
            run.run_id,
            command.kind,
            name,
            run.tenant,
            run.record.base_model,
            run.record.spec,
            directory,
            0,
            now,
            None if command.ttl_seconds is None else now + command.ttl_seconds,
            user_metadata=dict(command.user_metadata),
            has_optimizer=command.kind == "weights",
            seq_id=entry.seq_id,
        )

        def saved(size_bytes: int) -> Any:
            checkpoints.commit(record, size_bytes)
            return {"path": path_of(key_of(record)), "size_bytes": size_bytes}

        def over(_: Failure | None = None) -> None:
            checkpoints.release(key_of(record))

        assembly.flights[entry.request_id] = Flight(entry.request_id, saved, over, over, outlives_tick=True)
        manifest = _manifest(record) | _form(command, name)
        return lambda slot: assembly.saves.append(
            SaveAdapter(entry.request_id, slot, directory, record.has_optimizer, manifest)
        )

    def _snapshot(self, assembly: Assembly, run: Run, entry: RunEntry, command: SnapshotCommand) -> Place:
        samplers, request_id = self._books.samplers, entry.request_id
        number = command.sampling_session_seq_id
        sampler_id = sampler_id_for(run.record.session_id, number)
        earlier = samplers.find(sampler_id)
        is_again = (
            earlier is not None
            and earlier.record.run_id == run.run_id
            and earlier.record.seq_id == entry.seq_id
        )
        if earlier is not None and is_again and not earlier.awaited:
            raise _Done({"sampling_session_id": sampler_id})
        if earlier is not None and not is_again:
            raise UserError(f"sampling_session_seq_id {number} is already in use in this session")

        def frozen(_: Any) -> Any:
            if is_again:
                samplers.frozen_again(sampler_id)
                return {"sampling_session_id": sampler_id}
            now = self._books.clock.now()
            samplers.create(
                SamplerRecord(
                    sampler_id,
                    run.record.session_id,
                    run.tenant,
                    run.record.base_model,
                    now,
                    run_id=run.run_id,
                    snapshot=sampler_id,
                    seq_id=entry.seq_id,
                    inflight=command.inflight,
                ),
                run.group,
            )
            samplers.retire(run.run_id)
            return {"sampling_session_id": sampler_id}

        assembly.flights[request_id] = Flight(request_id, frozen)
        keeper = self._keeper
        path = None if keeper is None else keeper.files.path(keeper.sampler_file(sampler_id))
        return lambda slot: assembly.snapshots.append(Snapshot(request_id, slot, sampler_id, path))

    def _restore(self, assembly: Assembly, run: Run, request_id: str, command: RestoreCommand) -> Place:
        keeper = self._keeper
        assert keeper is not None

        def failed(failure: Failure) -> None:
            self.park(run.run_id)
            keeper.not_restored(run, command.covered, failure.message)

        assembly.flights[request_id] = Flight(request_id, lambda _: keeper.restored(run), failed)
        return lambda slot: assembly.restores.append(RestoreRun(request_id, run.run_id, slot, command.path))

    def _is_over(self, request_id: str) -> bool:
        return self._keeper is not None and self._keeper.is_over(request_id)

    def _unload(self, assembly: Assembly, run: Run, request_id: str) -> None:
        self._books.runs.unload(run)
        self._books.samplers.retire(run.run_id, keep=0)
        drop = self._residency.drop(run.run_id)
        if drop is not None:
            assembly.drops.append(drop)
        assembly.verdicts.append(Outcome(request_id, {"model_id": run.run_id}))
        if self._keeper is not None:
            self._keeper.retire(run)

    # what outcomes do to a run --------------------------------------------------------------------

    def _came_up(self, run: Run, answer: dict[str, Any]) -> dict[str, Any]:
        run.down = None
        return answer

    def _stayed_down(self, run: Run, failure: Failure) -> None:
        run.down = Failure(f"run {run.run_id} has no adapter: {failure.message}", failure.category)
        drop = self._residency.drop(run.run_id)
        if drop is not None:
            self._drops.append(drop)


def check_loadable(source: CheckpointRecord, base_model: str, optimizer: bool) -> None:
    """Raises UserError if no run of ``base_model`` can start from this checkpoint."""
    path = path_of(key_of(source))
    if source.base_model != base_model:
        raise UserError(f"path {path!r} belongs to base model {source.base_model}, not {base_model}")
    if optimizer and not source.has_optimizer:
        raise UserError(
            f"path {path!r} has no optimizer state; load it without, or from a weights/ checkpoint"
        )


def _shape(spec: LoraSpec) -> tuple[int, bool, bool, bool]:
    return spec.rank, spec.train_attn, spec.train_mlp, spec.train_unembed


def _words(spec: LoraSpec) -> str:
    return (
        f"rank {spec.rank} (train_attn={spec.train_attn}, train_mlp={spec.train_mlp}, "
        f"train_unembed={spec.train_unembed})"
    )


def _form(command: SaveCommand, name: str) -> dict[str, Any]:
    """How an export is written. The cookbook's tools, which ask for encryption, want the hosted service's
    layout; `tinker checkpoint download`, which does not, is to get what PEFT loads."""
    if command.kind != "external_weights":
        return {}
    hosted = bool(command.age_recipients) or name.endswith(".tinker")
    return {"layout": "tinker" if hosted else "peft", "age_recipients": list(command.age_recipients)}


def _manifest(record: CheckpointRecord) -> dict[str, Any]:
    return {
        "run_id": record.run_id,
        "kind": record.kind,
        "name": record.name,
        "base_model": record.base_model,
        "rank": record.spec.rank,
        "train_attn": record.spec.train_attn,
        "train_mlp": record.spec.train_mlp,
        "train_unembed": record.spec.train_unembed,
        "created_at": record.created_at,
        "user_metadata": dict(record.user_metadata),
    }
