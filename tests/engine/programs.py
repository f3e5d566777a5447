"""Random programs of many runs, and how to run them on an engine with few slots.

A program is a list of ticks; a tick gives some runs one thing to do each. Running a run's own part alone is
the same with ticks of one.
"""

from __future__ import annotations

import random
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from tests.engine.ticks import LOSSES, make_pass, make_sample, random_batch, run
from twinkle_serve.control.microbatches import Load, pack
from twinkle_serve.engine.engine import Engine
from twinkle_serve.engine.slots import AdapterState
from twinkle_serve.protocol.data import AdamParams, Column, DatumBatch, LoraSpec
from twinkle_serve.protocol.work import (
    AdapterRef,
    CreateAdapter,
    DropRun,
    LoadAdapter,
    OptimStep,
    Outcome,
    PageIn,
    PageOut,
    Pass,
    SaveAdapter,
    Snapshot,
)

KINDS = ("pass", "step", "step", "step", "forward", "optim", "save", "load", "sample", "bad")


@dataclass(frozen=True)
class Op:
    """One thing that run ``run`` does; ``seed`` decides every detail of it."""

    run: int
    kind: str
    seed: int


ProgramTicks = list[list[Op]]


def random_program(seed: int, num_runs: int, num_ticks: int, width: int) -> ProgramTicks:
    """Every run does something: the first ticks go through them all."""
    choose = random.Random(seed)
    ticks = []
    for tick in range(num_ticks):
        first = tick * width
        runs = range(first, min(first + width, num_runs)) if first < num_runs else ()
        chosen = list(runs) or choose.sample(range(num_runs), choose.randint(1, width))
        ticks.append([Op(r, choose.choice(KINDS), choose.getrandbits(32)) for r in chosen])
    return ticks


def alone(program: ProgramTicks, which: int) -> ProgramTicks:
    return [[op] for tick in program for op in tick if op.run == which]


def spec_of(which: int) -> LoraSpec:
    choose = random.Random(which)
    flags = [choose.random() < 0.7 for _ in range(3)]
    flags[choose.randrange(3)] = True
    return LoraSpec(choose.choice([1, 2, 3, 5, 8, 16, 32]), which, *flags)


def adam_of(seed: int) -> AdamParams:
    choose = random.Random(seed)
    return AdamParams(
        learning_rate=10 ** choose.uniform(-3.5, -2.5),
        beta1=choose.choice([0.8, 0.9]),
        beta2=choose.choice([0.95, 0.99]),
        eps=1e-4,
        weight_decay=choose.choice([0.0, 0.1]),
        grad_clip_norm=choose.choice([0.0, 0.5, 100.0]),
    )


def passes_of(op: Op, slot: int) -> list[Pass]:
    """One or two requests of random losses and shapes."""
    rng = np.random.default_rng(op.seed)
    passes = []
    for index in range(int(rng.integers(1, 3))):
        loss = LOSSES[int(rng.integers(len(LOSSES)))]
        k = 2 if loss == "cross_entropy" and rng.random() < 0.3 else 0
        batch = random_batch(rng, rng.integers(1, 9, rng.integers(1, 4)).tolist(), loss, k=k)
        if op.kind == "bad" and index == 0:
            name = "weights" if loss == "cross_entropy" else "advantages"
            widths = batch.columns[name].widths
            column = Column(np.full_like(batch.columns[name].values, np.nan), widths)
            batch = DatumBatch(batch.tokens, batch.lengths, {**batch.columns, name: column})
        name = f"{op.run}/pass{index}"
        passes.append(make_pass(name, slot, batch, loss, backward=op.kind != "forward"))
    return passes


@dataclass
class Trace:
    """What a run was told, in order, and what it was in the end."""

    answers: list[Outcome] = field(default_factory=list)
    end: AdapterState | None = None


class Machine:
    """Runs programs: gives runs slots, the least recently used one leaves, and keeps what they are told."""

    def __init__(self, engine: Engine, directory: Path) -> None:
        self._engine = engine
        self._directory = directory
        self._resident: OrderedDict[int, int] = OrderedDict()
        self._free = list(range(engine.pool.num_slots))
        self._known: set[int] = set()
        self._saved: set[int] = set()
        self.traces: dict[int, Trace] = {}

    def run(self, program: ProgramTicks) -> dict[int, Trace]:
        """Traces by run. Leaves the engine empty."""
        for tick in program:
            self._tick(tick)
        for which in sorted(self._known):
            self._tick([Op(which, "nothing", 0)])
            self.traces[which].end = self._engine.pool.state(self._resident[which])
        drops = tuple(DropRun(f"{which}", self._resident.get(which)) for which in self._known)
        run(self._engine, drops=drops)
        return self.traces

    def _tick(self, ops: Sequence[Op]) -> None:
        fields = self._place([op.run for op in ops])
        for op in ops:
            for name, items in self._work(op, self._resident[op.run]).items():
                fields[name] = (*fields.get(name, ()), *items)
        config = self._engine.base.config
        passes = fields.get("passes", ())
        batches = [DatumBatch.unpack(p.datums) for p in passes]
        loads = [Load(p.slot, p.backward, b.lengths.tolist()) for p, b in zip(passes, batches, strict=True)]
        fields["microbatches"] = pack(loads, config.microbatch_tokens, config.deterministic)
        found = run(self._engine, decode_budget_s=60.0, **fields)
        for name in sorted(found):
            self.traces[int(name.partition("/")[0])].answers.append(found[name])

    def _place(self, wanted: list[int]) -> dict[str, Any]:
        fields: dict[str, Any] = {"page_out": (), "page_in": (), "creates": ()}
        for which in wanted:
            if which in self._resident:
                self._resident.move_to_end(which)
                continue
            if self._free:
                slot = self._free.pop()
            else:
                victim = next(other for other in self._resident if other not in wanted)
                slot = self._resident.pop(victim)
                fields["page_out"] += (PageOut(slot, f"{victim}"),)
            if which in self._known:
                fields["page_in"] += (PageIn(slot, f"{which}"),)
            else:
                self._known.add(which)
                self.traces[which] = Trace()
                create = CreateAdapter(f"{which}/create", f"{which}", slot, spec_of(which))
                fields["creates"] += (create,)
            self._resident[which] = slot
        return fields

    def _work(self, op: Op, slot: int) -> dict[str, Sequence[Any]]:
        directory = str(self._directory / f"{op.run}")
        if op.kind in ("pass", "forward", "bad"):
            return {"passes": passes_of(op, slot)}
        if op.kind in ("step", "optim"):
            step = OptimStep(f"{op.run}/step", slot, adam_of(op.seed))
            return {"passes": passes_of(op, slot) if op.kind == "step" else (), "optim_steps": (step,)}
        if op.kind == "save":
            self._saved.add(op.run)
            return {"saves": (SaveAdapter(f"{op.run}/save", slot, directory, True, {}),)}
        if op.kind == "load" and op.run in self._saved:
            load = LoadAdapter(f"{op.run}/load", f"{op.run}", slot, directory, bool(op.seed % 2))
            return {"loads": (load,)}
        if op.kind == "sample":
            ref = AdapterRef(f"{op.run}/{op.seed}")
            request = make_sample(
                f"{op.run}/sample", [op.run, 7], ref, max_tokens=4, seed=op.seed, top_k=3, num_samples=2
            )
            return {"snapshots": (Snapshot(f"{op.run}/snap", slot, ref.adapter),), "samples": (request,)}
        return {}
