"""Random programs of many runs on few slots: two and four ranks answer every tick as one rank does.

The long form, 100 ticks for each way and all of it on four ranks as well, runs with TWINKLE_SHARDING_LONG
set.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.engine.programs import Machine, random_program
from tests.engine.sharding import remote
from tests.engine.sharding.compare import Both, assert_items, passes
from tests.engine.sharding.conftest import BothFactory
from tests.engine.sharding.test_sampler import requests, snapshots
from tests.engine.sharding.test_training import SPECS, step_all, ways, work
from twinkle_serve.engine.engine import Engine
from twinkle_serve.protocol.work import LoadAdapter, SaveAdapter, Tick
from twinkle_serve.testing.crew import Crew

LONG = bool(os.environ.get("TWINKLE_SHARDING_LONG"))
long = pytest.mark.skipif(not LONG, reason="make test-sharding runs it")


class Recorder:
    """One rank's engine, with every tick it walked and what it said."""

    def __init__(self, engine: Engine) -> None:
        self.pool, self.base = engine.pool, engine.base
        self._engine = engine
        self.ticks: list[tuple[Tick, list[Any]]] = []

    def run(self, tick: Tick) -> Iterator[Any]:
        self.ticks.append((tick, list(self._engine.run(tick))))
        yield from self.ticks[-1][1]


def replay(pair: Both, seed: int, num_ticks: int, directory: Path) -> None:
    recorder = Recorder(pair.one)
    program = random_program(seed, num_runs=6, num_ticks=num_ticks, width=4)
    Machine(recorder, directory).run(program)  # type: ignore[arg-type]
    for tick, expected in recorder.ticks:
        items, *_ = pair.crew.run(remote.run_tick, pair.config, tick)
        assert_items(items, expected)


@ways
@pytest.mark.timeout(900)
def test_random_ticks(both: BothFactory, sharding: str, tmp_path: Path) -> None:
    short = 25 if sharding == "expert_parallel" else 10
    pair = both(sharding, max_resident_adapters=4, host_page_bytes=2**20)
    replay(pair, seed=1, num_ticks=100 if LONG else short, directory=tmp_path)


@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
    ("sharding", "checkpointing"),
    [
        ("expert_parallel", False),
        pytest.param("expert_parallel", True, marks=[long, pytest.mark.slow]),
        pytest.param("zero3", False, marks=[long, pytest.mark.slow]),
        pytest.param("zero3", True, marks=[long, pytest.mark.slow]),
    ],
)
def test_four_ranks(
    both: BothFactory, four: Crew, sharding: str, checkpointing: bool, tmp_path: Path
) -> None:
    fields = {"activation_checkpointing": checkpointing, "max_resident_adapters": 4}
    pair = both(sharding, ranks=four, **fields)
    refs = snapshots(pair)
    pair.run(samples=requests(refs, 9), decode_budget_s=300.0)
    pair.run(**passes(work(1, [[9, 2, 31, 4], [17], [3, 3, 8]]), tokens=40))
    pair.assert_same_slots(range(3))
    step_all(pair)
    pair.run(**passes(work(2, [[5, 1, 1]])))  # a rank has nothing
    saves = tuple(SaveAdapter(f"s{i}", i, str(tmp_path / f"{i}"), True, {}) for i in range(len(SPECS)))
    pair.run(saves=saves)
    pair.run(loads=tuple(LoadAdapter(f"l{i}", f"run{i}", i, s.directory, True) for i, s in enumerate(saves)))
    step_all(pair)
    pair.run(**passes(work(3, [[4, 4, 4]])))
    pair.assert_same_slots([0])


@long
@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_random_ticks_on_four_ranks(both: BothFactory, four: Crew, tmp_path: Path) -> None:
    replay(both("expert_parallel", ranks=four, max_resident_adapters=4), 2, 100, tmp_path)
