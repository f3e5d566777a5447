"""``make bench-durability``: what journal and snapshots cost a training step, and how fast a run is back.

Three control planes over an engine each, in one process, take turns with the same batch: two forget
everything, one journals each request before it answers and snapshots its run as configured by default. A
turn is long enough for snapshots and waits for them. Knows no HTTP and no Ray, whose cost is the same with
and without. Recovery is the time from the loss of everything in memory, model load excluded, to the answer
of the next request.
"""

from __future__ import annotations

import argparse
import asyncio
import math
import statistics
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from benchmarks.common import Report, Timing, interleave
from twinkle_serve.config import Config, StorageConfig
from twinkle_serve.control.backend import Command, OptimCommand, PassCommand
from twinkle_serve.control.durability import Durability
from twinkle_serve.control.service import ControlPlane
from twinkle_serve.engine.engine import Engine
from twinkle_serve.protocol.data import AdamParams, Column, DatumBatch, LoraSpec
from twinkle_serve.protocol.work import ModelInfo, Outcome, Tick, TickReport
from twinkle_serve.storage.catalog import Catalog
from twinkle_serve.storage.journal import Journal
from twinkle_serve.storage.states import StateFiles
from twinkle_serve.testing.models import build_bench_moe, build_tiny_qwen3_moe

TENANT = "bench"
RANK = 8
WARMUP_STEPS = 3
_POLL_S = 0.005


class CountedFiles(StateFiles):
    """num: snapshots begun so far."""

    num = 0

    def name_for(self, owner: str, detail: str) -> str:
        self.num += 1
        return super().name_for(owner, detail)


class ThreadGroup:
    """control.group.Group: an engine behind a thread."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._thread = ThreadPoolExecutor(1)

    @property
    def info(self) -> ModelInfo:
        return self._engine.info

    async def run(self, tick: Tick) -> AsyncIterator[Outcome | TickReport]:
        loop = asyncio.get_running_loop()
        for item in await loop.run_in_executor(self._thread, lambda: list(self._engine.run(tick))):
            yield item

    async def rebuild(self) -> ModelInfo:
        raise NotImplementedError


class Side:
    """A server with one run. ``durable`` sides keep it below ``root``."""

    def __init__(self, config: Config, engine: Engine, root: Path, durable: bool) -> None:
        self.config, self._engine, self._root, self._durable = config, engine, root, durable
        self.loop = asyncio.new_event_loop()
        self.run_id = ""
        self._seq_id = 0
        self.num_steps = 0
        self._journal: Journal
        self.files: CountedFiles
        self.open()

    def open(self) -> None:
        self.loop.run_until_complete(self._open())

    async def _open(self) -> None:
        durability = None
        if self._durable:
            self._journal, self.files = Journal(self._root), CountedFiles(self._root)
            durability = Durability(self._journal, self.files)
        group = ThreadGroup(self._engine)
        catalog = Catalog(self._root)
        self._plane = ControlPlane({"bench": group}, catalog, self.config, durability=durability)
        await self._plane.start()

    def create(self) -> None:
        async def create() -> str:
            session = await self._plane.create_session(TENANT, {})
            spec = LoraSpec(RANK, seed=1)
            request = await self._plane.create_model(TENANT, session, 0, "bench", spec, {})
            poll = await self._plane.poll(TENANT, request, 60.0)
            return str(poll.value["model_id"])

        self.run_id = self.loop.run_until_complete(create())

    def step(self, batch: DatumBatch) -> None:
        """forward_backward and optim_step, sent together, as SDK programs do; returns with both answers."""

        async def step() -> None:
            lengths = tuple(batch.lengths.tolist())
            passing: Command = PassCommand(batch.pack(), lengths, "cross_entropy", {}, True)
            requests = await asyncio.gather(self._submit(passing), self._submit(OptimCommand(AdamParams())))
            for request in requests:
                poll = await self._plane.poll(TENANT, request, 120.0)
                assert poll.state == "done"
                assert poll.failure is None, poll.failure

        self.loop.run_until_complete(step())
        self.num_steps += 1

    async def _submit(self, command: Command) -> str:
        self._seq_id += 1
        return await self._plane.submit(TENANT, self.run_id, self._seq_id, command)

    def settle(self) -> None:
        """Returns once nothing is being written any more."""

        async def settle() -> None:
            while self._plane.gauges()["bench"]["requests_in_flight"]:
                await asyncio.sleep(_POLL_S)
            await asyncio.sleep(_POLL_S)  # a snapshot that is written is then listed in the journal
            await self._journal.flush()

        if self._durable:
            self.loop.run_until_complete(settle())

    def close(self) -> None:
        self.loop.run_until_complete(self._plane.close())

    def recover(self, batch: DatumBatch) -> float:
        """Seconds from opening the storage again on an engine that has nothing, to the next step's answer."""
        self.close()
        for slot in range(self._engine.pool.num_slots):
            self._engine.pool.free(slot)

        def come_back() -> None:
            self.open()
            self.step(batch)

        return timed(come_back)


def make_batch(engine: Engine, tokens: int) -> DatumBatch:
    draw = np.random.default_rng(0)
    lengths = np.full(max(1, tokens // 64), 64)
    total, widths = int(lengths.sum()), np.zeros(len(lengths), np.int32)
    vocabulary = engine.info.vocab_size
    return DatumBatch(
        draw.integers(0, vocabulary, total).astype(np.int32),
        lengths,
        {
            "target_tokens": Column(draw.integers(0, vocabulary, total), widths),
            "weights": Column(np.ones(total, np.float32), widths),
        },
    )


@dataclass(frozen=True, slots=True)
class Arm:
    """step: one step. settle: returns when all that the steps so far began is over."""

    step: Callable[[], object]
    settle: Callable[[], object]

    def turn(self, steps: int) -> None:
        for _ in range(steps):
            self.step()
        self.settle()


def step_times(arms: Mapping[str, Arm], steps: int, turns: int) -> dict[str, Timing]:
    """Of a step of each arm: the mean over a turn of ``steps``, and of the turns the median. The mean,
    because what comes once in fifty steps is a part of what each of them costs."""
    found = interleave({name: partial(arm.turn, steps) for name, arm in arms.items()}, turns, warmup=0)
    return {name: Timing(timing.wall / steps, timing.cpu / steps) for name, timing in found.items()}


def turn_of(storage: StorageConfig, step_s: float) -> int:
    """So many steps of ``step_s`` seconds each that one or two snapshots come with them, by their number or
    by the time that it would take to do them again."""
    return min(storage.snapshot_every_steps, math.ceil(2 * storage.snapshot_replay_s / step_s))


def measure(report: Report, sides: Mapping[str, Side], batch: DatumBatch, turns: int) -> None:
    """sides: "off", "on", "off again". Twice without: what the two differ by is the noise of the machine, and
    of where in memory an engine happens to lie."""
    for _ in range(WARMUP_STEPS):
        took = [timed(partial(side.step, batch)) for side in sides.values()]
    on = sides["on"]
    on.settle()
    steps, before = turn_of(on.config.storage, statistics.median(took)), on.files.num
    arms = {name: Arm(partial(side.step, batch), side.settle) for name, side in sides.items()}
    timings = step_times(arms, steps, turns)
    label = f"step of {int(batch.lengths.sum())} tokens"
    for what in ("wall", "cpu"):
        each = {name: getattr(timing, what) for name, timing in timings.items()}
        without = (each["off"] + each["off again"]) / 2
        row = f"{label}, {what}:"
        report.row(f"{row} with journal and snapshots / without", each["on"] / without, "<= 1.05", timings)
        report.row(f"{row} without / without", each["off again"] / each["off"])
    report.row(f"{label}: snapshots in {turns} turns of {steps} steps", on.files.num - before)


def timed(work: Callable[[], object]) -> float:
    """Seconds."""
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", type=Path, default=Path("models"))
    parser.add_argument("--turns", type=int, default=4, help="of each side, at each size")
    parser.add_argument("--tiny", action="store_true", help="a model of no size, to see the fixed cost")
    options = parser.parse_args()
    build = build_tiny_qwen3_moe if options.tiny else build_bench_moe
    model = {"name": "bench", "path": str(build(options.models)), "num_threads": 1, "device": "cpu"}
    report = Report("durability")
    with tempfile.TemporaryDirectory(prefix="bench-", dir=options.models) as scratch:
        root = Path(scratch)
        config = Config.model_validate({"models": [model], "storage": {"root": str(root)}})
        engines = {name: Engine(config.models[0]) for name in ("off", "on", "off again")}
        sides = {
            name: Side(config, engine, root / name, durable=name == "on") for name, engine in engines.items()
        }
        for side in sides.values():
            side.create()
        for tokens in (64, 1024):
            batch = make_batch(engines["on"], tokens)
            measure(report, sides, batch, options.turns)
        on = sides["on"]
        seconds = on.recover(batch)
        one = timed(partial(on.step, batch))
        report.row(f"recovery after {on.num_steps} steps ({seconds:.1f} s) / one step", seconds / one)
        for name, side in sides.items():
            side.close()
            engines[name].close()
    report.write()


if __name__ == "__main__":
    main()
