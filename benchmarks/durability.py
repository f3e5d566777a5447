"""``make bench-durability``: what journal and snapshots cost a training step, and how fast a run is back.

Two control planes over two engines in one process step the same batch in turn: one forgets everything, one
journals each request before it answers and snapshots its run as configured by default. Knows no HTTP and
no Ray, whose cost is the same with and without. Recovery is the time from the loss of everything in memory,
model load excluded, to the answer of the next request.
"""

from __future__ import annotations

import argparse
import asyncio
import tempfile
import time
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from benchmarks.common import Report, interleave
from twinkle_serve.config import Config
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
        self._config, self._engine, self._root, self._durable = config, engine, root, durable
        self.loop = asyncio.new_event_loop()
        self.run_id = ""
        self._seq_id = 0
        self.num_steps = 0
        self.open()

    def open(self) -> None:
        self.loop.run_until_complete(self._open())

    async def _open(self) -> None:
        durability = None
        if self._durable:
            durability = Durability(Journal(self._root), StateFiles(self._root))
        group = ThreadGroup(self._engine)
        catalog = Catalog(self._root)
        self._plane = ControlPlane({"bench": group}, catalog, self._config, durability=durability)
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

    def close(self) -> None:
        self.loop.run_until_complete(self._plane.close())

    def recover(self, batch: DatumBatch) -> float:
        """Seconds from opening the storage again on an engine that has nothing, to the next step's answer."""
        self.close()
        for slot in range(self._engine.pool.num_slots):
            self._engine.pool.free(slot)
        began = time.perf_counter()
        self.open()
        self.step(batch)
        return time.perf_counter() - began


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", type=Path, default=Path("models"))
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--tiny", action="store_true", help="a model of no size, to see the fixed cost")
    options = parser.parse_args()
    build = build_tiny_qwen3_moe if options.tiny else build_bench_moe
    model = {"name": "bench", "path": str(build(options.models)), "num_threads": 1, "device": "cpu"}
    report = Report("durability")
    with tempfile.TemporaryDirectory(dir=".") as scratch:
        root = Path(scratch)
        config = Config.model_validate({"models": [model], "storage": {"root": str(root)}})
        engines = [Engine(config.models[0]) for _ in range(2)]
        off = Side(config, engines[0], root / "off", durable=False)
        on = Side(config, engines[1], root / "on", durable=True)
        off.create()
        on.create()
        for tokens in (64, 1024):
            batch = make_batch(engines[0], tokens)
            # Twice without: what the two differ by is the noise of the machine.
            arms = {
                "off": lambda b=batch: off.step(b),
                "on": lambda b=batch: on.step(b),
                "off again": lambda b=batch: off.step(b),
            }
            timings = interleave(arms, options.rounds, warmup=3)
            for what in ("wall", "cpu"):
                took = {name: getattr(timing, what) for name, timing in timings.items()}
                row = f"step of {tokens} tokens, {what}:"
                without = (took["off"] + took["off again"]) / 2
                report.row(
                    f"{row} with journal and snapshots / without", took["on"] / without, "<= 1.05", timings
                )
                report.row(f"{row} without / without", took["off again"] / took["off"])
        seconds = on.recover(batch)
        began = time.perf_counter()
        on.step(batch)
        one = time.perf_counter() - began
        report.row(f"recovery after {on.num_steps} steps ({seconds:.1f} s) / one step", seconds / one)
        for side, engine in zip((off, on), engines, strict=True):
            side.close()
            engine.close()
    report.write()


if __name__ == "__main__":
    main()
