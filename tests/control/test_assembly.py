from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest

from tests.control.echo_group import pass_command
from tests.control.memory_catalog import MemoryCatalog
from tests.control.plane import optim
from twinkle_serve.config import LimitsConfig
from twinkle_serve.control.assembly import Assembler
from twinkle_serve.control.backend import LoadCommand, SaveCommand, SnapshotCommand, UnloadCommand
from twinkle_serve.control.books import open_books
from twinkle_serve.control.commands import BirthCommand
from twinkle_serve.control.flights import INTERNAL_ERROR, Assembly
from twinkle_serve.control.log import Entry
from twinkle_serve.control.planner import RunWork, Window
from twinkle_serve.control.residency import Residency
from twinkle_serve.protocol.data import LoraSpec
from twinkle_serve.protocol.work import (
    CreateAdapter,
    DropRun,
    Failure,
    LoadAdapter,
    OptimStep,
    Outcome,
    PageOut,
    Piece,
    Snapshot,
)
from twinkle_serve.storage.records import CheckpointRecord, RunRecord

SPEC = LoraSpec(8)


class Bench:
    """An assembler with two slots; ``tick`` assembles commands by run."""

    def __init__(self) -> None:
        clock = SimpleNamespace(now=lambda: 1000.0)
        self.books = open_books(MemoryCatalog(), clock, LimitsConfig(), lambda base_model: 300.0)
        self.residency = Residency(2)
        self.assembler = Assembler("base", self.books, self.residency, 4096, False)
        self.assembly = Assembly()
        self.seq_id = 0

    def run(self, run_id: str, down: Failure | None = None):
        run = self.books.runs.create(RunRecord(run_id, "s", 0, "alice", "base", SPEC, 0.0, 0.0))
        run.down = down
        return run

    def checkpoint(self, name: str = "ck", **fields) -> str:
        values = {"has_optimizer": True} | fields
        spec = values.pop("spec", SPEC)
        self.books.checkpoints.restore(
            CheckpointRecord("r", "weights", name, "alice", "base", spec, f"/d/{name}", 1, 0.0, **values)
        )
        return f"tinker://r/weights/{name}"

    def tick(self, work: dict, **options):
        entries = []
        for run_id, commands in work.items():
            batch = [Entry(self._next(), f"{run_id}.{n}", command) for n, command in enumerate(commands)]
            entries.append(RunWork(run_id, "alice", batch))
        self.assembly = Assembly()
        return self.assembler.assemble(self.assembly, Window(tuple(entries)), **options)

    def _next(self) -> int:
        self.seq_id += 1
        return self.seq_id

    def succeed(self, request_id: str, value=None):
        return self.assembly.flights[request_id].on_value(value)

    def fail(self, request_id: str) -> None:
        self.assembly.flights[request_id].on_failure(Failure("broken"))


@pytest.fixture
def bench() -> Bench:
    return Bench()


def test_a_tick_has_each_command_in_its_field(bench):
    bench.run("r")
    bench.run("q")
    path = bench.checkpoint()
    commands = [
        LoadCommand(path, True),
        pass_command("p", 3, 4),
        optim(),
        SaveCommand("weights", "n", user_metadata={"k": "v"}),
        SnapshotCommand(5),
    ]
    tick = bench.tick({"q": [optim(2.0)], "r": commands})
    assert tick.loads == (LoadAdapter("r.0", "r", 1, "/d/ck", True),)
    assert [(p.request_id, p.slot, p.backward, p.loss_fn) for p in tick.passes] == [
        ("r.1", 1, True, "cross_entropy")
    ]
    assert tick.microbatches == ((Piece(0, (0, 1)),),)
    assert tick.optim_steps == (
        OptimStep("q.0", 0, optim(2.0).params),
        OptimStep("r.2", 1, optim().params),
    )
    (save,) = tick.saves
    assert (save.request_id, save.slot, save.directory, save.optimizer) == (
        "r.3",
        1,
        "/nowhere/r/weights/n",
        True,
    )
    assert save.manifest["user_metadata"] == {"k": "v"}
    assert save.manifest["rank"] == 8
    assert tick.snapshots == (Snapshot("r.4", 1, "s:sample:5"),)
    assert bench.assembly.verdicts == []
    assert {f.request_id for f in bench.assembly.flights.values() if f.outlives_tick} == {"r.3"}


def test_nothing_to_do_is_no_tick_unless_asked_for(bench):
    assert bench.tick({}) is None
    assert bench.tick({}, even_if_empty=True).tick_id == 1
    assert bench.tick({}, cancels=["x"]).cancels == ("x",)


def test_a_birth_creates_and_brings_the_run_up(bench):
    run = bench.run("r", Failure("not yet"))
    tick = bench.tick({"r": [BirthCommand()]})
    assert tick.creates == (CreateAdapter("r.0", "r", 0, SPEC),)
    assert run.down is not None
    assert bench.succeed("r.0") == {"model_id": "r"}
    assert run.down is None


def test_a_failed_birth_leaves_the_run_down_and_cleans_its_slot(bench):
    run = bench.run("r", Failure("not yet"))
    bench.tick({"r": [BirthCommand()]})
    bench.fail("r.0")
    assert "no adapter: broken" in run.down.message
    assert bench.tick({}).drops == (DropRun("r", 0),)
    assert bench.tick({"r": [optim()]}) is None
    assert bench.assembly.verdicts[0].failure == run.down


def test_a_failed_load_into_a_living_run_leaves_it_up(bench):
    run = bench.run("r")
    bench.tick({"r": [LoadCommand(bench.checkpoint(), True)]})
    bench.fail("r.0")
    assert run.down is None
    assert bench.tick({}) is None


@pytest.mark.parametrize("outcome", ["succeed", "fail"])
def test_a_checkpoint_is_held_while_it_is_loaded(bench, outcome):
    bench.run("r")
    path = bench.checkpoint()
    bench.tick({"r": [LoadCommand(path, True)]})
    assert bench.books.checkpoints._pins["/d/ck"] == 1
    getattr(bench, outcome)("r.0")
    assert bench.books.checkpoints._pins["/d/ck"] == 0


def test_what_cannot_run_is_a_verdict_and_takes_no_slot(bench):
    bench.run("r")
    wrong_model = bench.checkpoint("other")
    record = bench.books.checkpoints.find("alice", wrong_model)
    bench.books.checkpoints.restore(replace(record, base_model="else"))
    loads = [
        LoadCommand("nowhere", False),
        LoadCommand("tinker://r/weights/absent", False),
        LoadCommand(bench.checkpoint("bare", has_optimizer=False), True),
        LoadCommand(bench.checkpoint("wide", spec=LoraSpec(16)), False),
        LoadCommand(bench.checkpoint("headless", spec=LoraSpec(8, train_unembed=False)), False),
        LoadCommand(wrong_model, False),
        SaveCommand("weights", "a/b"),
        SaveCommand("weights", "n", ttl_seconds=1),
    ]
    assert bench.tick({"r": loads}) is None
    messages = [verdict.failure.message for verdict in bench.assembly.verdicts]
    for message, part in zip(
        messages,
        [
            "of the form",
            "not exist",
            "no optimizer",
            "rank 16",
            "unembed=False",
            "else",
            "a/b",
            "ttl_seconds",
        ],
        strict=True,
    ):
        assert part in message
    assert {verdict.failure.category for verdict in bench.assembly.verdicts} == {"user"}
    assert bench.residency.num_resident == 0


def test_the_seed_of_a_checkpoint_does_not_matter(bench):
    bench.run("r")
    path = bench.checkpoint(spec=LoraSpec(8, seed=99))
    assert bench.tick({"r": [LoadCommand(path, False)]}).loads


def test_runs_are_moved_before_they_are_used(bench):
    for run_id in "abc":
        bench.run(run_id)
    bench.tick({"a": [optim()], "b": [optim()]})
    tick = bench.tick({"c": [optim()]})
    assert tick.page_out == (PageOut(0, "a"),)
    assert tick.optim_steps[0].slot == 0


def test_an_unloaded_run_is_dropped_and_answered_after_the_tick(bench):
    run = bench.run("r")
    bench.tick({"r": [optim()]})
    tick = bench.tick({"r": [UnloadCommand()]})
    assert tick.drops == (DropRun("r", 0),)
    assert [verdict.value for verdict in bench.assembly.verdicts] == [{"model_id": "r"}]
    assert run.record.unloaded


def test_a_failed_save_gives_its_name_back(bench):
    bench.run("r")
    bench.tick({"r": [SaveCommand("weights", "n")]})
    bench.fail("r.0")
    bench.tick({"r": [SaveCommand("weights", "n")]})
    assert bench.succeed("r.0", 77) == {"path": "tinker://r/weights/n", "size_bytes": 77}
    assert bench.books.checkpoints.find("alice", "tinker://r/weights/n").size_bytes == 77


def test_a_snapshot_number_that_is_taken_is_refused(bench):
    bench.run("r")
    bench.tick({"r": [SnapshotCommand(0)]})
    assert bench.succeed("r.0") == {"sampling_session_id": "s:sample:0"}
    assert bench.tick({"r": [SnapshotCommand(0)]}) is None
    assert "already in use" in bench.assembly.verdicts[0].failure.message


def test_only_weights_keep_optimizer_state(bench):
    bench.run("r")
    kinds = ["weights", "sampler_weights", "external_weights"]
    tick = bench.tick({"r": [SaveCommand(kind, "n") for kind in kinds]})
    assert [save.optimizer for save in tick.saves] == [True, False, False]


def test_an_unload_that_cannot_be_saved_leaves_its_run_and_all_others_as_they_are(bench, monkeypatch, caplog):
    run = bench.run("r")
    bench.run("q")
    bench.tick({"r": [optim()]})
    with monkeypatch.context() as patched:
        patched.setattr(bench.books.runs, "_save", lambda record: 1 / 0)
        tick = bench.tick({"r": [UnloadCommand()], "q": [pass_command("p")]})
    assert [p.request_id for p in tick.passes] == ["q.0"]
    assert tick.drops == ()
    assert bench.assembly.verdicts == [Outcome("r.0", failure=INTERNAL_ERROR)]
    assert run.down is None
    assert not run.record.unloaded
    assert bench.tick({"r": [UnloadCommand()]}).drops == (DropRun("r", 0),)
    assert run.record.unloaded
