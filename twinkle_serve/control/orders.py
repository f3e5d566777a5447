"""What each command asks of the group, and what its outcome will mean for its run.

Knows commands, runs and checkpoints. Does not know slots (assembly.py hands them in), ticks or who waits;
what is left in a file or a snapshot is the business of saves.py.
"""

from __future__ import annotations

from collections.abc import Callable
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
)
from twinkle_serve.control.books import Books
from twinkle_serve.control.checkpoints import key_of, path_of
from twinkle_serve.control.commands import BirthCommand, DoneCommand, RestoreCommand, RunEntry
from twinkle_serve.control.flights import Assembly, Flight
from twinkle_serve.control.keeper import Keeper
from twinkle_serve.control.runs import Run
from twinkle_serve.control.saves import Done, Place, Refused, save_order, snapshot_order
from twinkle_serve.control.telling import proof_of
from twinkle_serve.protocol.data import LoraSpec
from twinkle_serve.protocol.errors import UserError
from twinkle_serve.protocol.work import CreateAdapter, Failure, LoadAdapter, OptimStep, Pass, RestoreRun
from twinkle_serve.storage.records import CheckpointRecord

__all__ = ["Done", "Orders", "Place", "Refused", "check_loadable"]


class Orders:
    """give_up: frees the slot of a run that has nothing in it that is worth keeping."""

    def __init__(self, books: Books, keeper: Keeper | None, give_up: Callable[[str], object]) -> None:
        self._books = books
        self._keeper = keeper
        self._give_up = give_up

    def of(self, assembly: Assembly, run: Run, entry: RunEntry) -> Place:
        """What to add to the tick once the run's slot is known; ``assembly`` is told what becomes of its
        outcome. Raises Done or Refused, or what is wrong with the command."""
        command = entry.command
        request_id = entry.request_id
        if run.down is not None and run.record.unloaded:
            raise Refused(run.down)
        match command:
            case DoneCommand(value):
                raise Done(value)
            case RejectedCommand(failure):
                if entry.seq_id == 0:
                    self._stayed_down(run, failure)  # its birth, which failed in an earlier life
                raise Refused(failure)
            case RestoreCommand():
                return self._restore(assembly, run, request_id, command)
            case BirthCommand(path=None):
                return self._birth(assembly, run, request_id, command)
            case BirthCommand() | LoadCommand():
                return self._load(assembly, run, request_id, command)
        if run.down is not None:
            raise Refused(run.down)
        match command:
            case PassCommand():
                return self._pass(assembly, request_id, command)
            case OptimCommand(params):
                assembly.flights[request_id] = Flight(request_id, proof=proof_of(command))
                return lambda slot: assembly.optim_steps.append(OptimStep(request_id, slot, params))
            case SaveCommand():
                return save_order(self._books, self._keeper, assembly, run, entry, command)
            case SnapshotCommand():
                return snapshot_order(self._books, self._keeper, assembly, run, entry, command)
        raise AssertionError(command)

    def _pass(self, assembly: Assembly, request_id: str, command: PassCommand) -> Place:
        assembly.flights[request_id] = Flight(request_id, proof=proof_of(command))

        def place(slot: int) -> None:
            assembly.passes.append(
                Pass(request_id, slot, command.datums, command.loss_fn, command.loss_config, command.backward)
            )
            assembly.lengths.append(command.lengths)

        return place

    def _birth(self, assembly: Assembly, run: Run, request_id: str, command: BirthCommand) -> Place:
        assembly.flights[request_id] = Flight(
            request_id,
            lambda _: self._came_up(run, {"model_id": run.run_id}),
            lambda failure: self._stayed_down(run, failure),
            proof=proof_of(command),
        )
        spec = run.record.spec
        return lambda slot: assembly.creates.append(CreateAdapter(request_id, run.run_id, slot, spec))

    def _load(
        self, assembly: Assembly, run: Run, request_id: str, command: BirthCommand | LoadCommand
    ) -> Place:
        """Into the run's adapter, or as its first one if it has none."""
        path, optimizer = command.path, command.optimizer
        assert path is not None
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
            request_id, loaded, failed, lambda: checkpoints.unpin(source.directory), proof_of(command)
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

    def _restore(self, assembly: Assembly, run: Run, request_id: str, command: RestoreCommand) -> Place:
        keeper = self._keeper
        assert keeper is not None

        def failed(failure: Failure) -> None:
            self._give_up(run.run_id)
            if failure.category == "user":
                keeper.damaged(run, command.covered, failure.message)
            else:
                keeper.not_restored(run, failure.message)

        assembly.flights[request_id] = Flight(request_id, lambda _: keeper.restored(run), failed)
        return lambda slot: assembly.restores.append(RestoreRun(request_id, run.run_id, slot, command.path))

    # what outcomes do to a run --------------------------------------------------------------------

    def _came_up(self, run: Run, answer: dict[str, Any]) -> dict[str, Any]:
        run.down = None
        return answer

    def _stayed_down(self, run: Run, failure: Failure) -> None:
        run.down = Failure(f"run {run.run_id} has no adapter: {failure.message}", failure.category)
        self._give_up(run.run_id)


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
