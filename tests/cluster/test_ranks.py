"""Two ranks that really meet in gloo collectives: they start, agree, and a lost one is named in seconds.

Each fault costs a rebuild, so ``make test`` plants two of them and ``make test-faults`` all.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from twinkle_serve.cluster.group import LoadError, RayGroup
from twinkle_serve.config import ModelConfig
from twinkle_serve.control.group import GroupLost
from twinkle_serve.protocol.data import AdamParams
from twinkle_serve.protocol.work import OptimStep, Outcome, Pass, Tick, TickReport

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("ray_cluster")]
GLOO = "tests.cluster.gloo_engine:GlooEngine"
CONFIG = ModelConfig(
    name="tiny",
    path="gloo",
    device="cpu",
    num_threads=1,
    ranks=2,
    sharding="expert_parallel",
    stall_deadline_s=2.0,
    tick_deadline_s=15.0,
)
NO_PROGRESS = r"of tiny has made no progress for \d.\d s in phase 'passes' of tick 2"
# On a busy machine its silence may be noticed before its death.
DIED = "of tiny(: .*died| does not answer for 2 s)"
SHORT = [("die", 1, f"rank 1 {DIED}"), ("loop", 1, f"rank 1 {NO_PROGRESS}")]
FULL = [
    ("die", 0, f"rank 0 {DIED}"),
    ("raise", 1, "rank 1 of tiny: planted"),
    ("loop", 0, f"rank 0 {NO_PROGRESS}"),
    ("stop", 1, "rank 1 of tiny does not answer for 2 s"),
    ("skip", 1, "rank 0 of tiny has made no progress"),
    ("slow", 1, "not finished in 15 s"),
]
FAULTS = SHORT + (FULL if os.environ.get("TWINKLE_FAULT_SEEDS") else [])


@pytest.fixture(scope="module")
def shared(ray_cluster: None) -> Iterator[RayGroup]:
    group = RayGroup(CONFIG, GLOO)
    yield group
    group.kill()


@pytest.fixture
async def group(shared: RayGroup) -> RayGroup:
    """Up, whatever the test before did to it."""
    if not shared.ready:
        await shared.rebuild()
    return shared


def _tick(tick_id: int, fault: str = "fine", **config: float) -> Tick:
    return Tick(tick_id, passes=(Pass("p", 0, b"", fault, config, backward=True),))


async def _run(group: RayGroup, tick: Tick) -> list[Outcome | TickReport]:
    return [item async for item in group.run(tick)]


async def _sum(group: RayGroup, tick: Tick) -> float:
    outcome, _ = await _run(group, tick)
    assert isinstance(outcome, Outcome)
    return float(outcome.value["sum"])


async def test_the_ranks_meet_on_their_own_interface(group: RayGroup) -> None:
    assert await _sum(group, _tick(1)) == 3.0
    step, _ = await _run(group, Tick(2, optim_steps=(OptimStep("o", 0, AdamParams()),)))
    assert isinstance(step, Outcome)
    assert Path(f"/sys/class/net/{step.value['interface']}").exists()


async def test_a_slow_rank_that_gets_on_is_not_shot_nor_the_one_that_waits(group: RayGroup) -> None:
    assert await _sum(group, _tick(1, "slow", rank=1, beats=40)) == 3.0


@pytest.mark.parametrize(("fault", "rank", "reason"), FAULTS)
async def test_the_guilty_rank_is_named_and_the_group_comes_back(
    group: RayGroup, caplog: pytest.LogCaptureFixture, fault: str, rank: int, reason: str
) -> None:
    began = time.monotonic()
    with caplog.at_level(logging.ERROR), pytest.raises(GroupLost, match=reason):
        await _run(group, _tick(2, fault, rank=rank, beats=1000))
    assert time.monotonic() - began < CONFIG.tick_deadline_s + 5  # not gloo's half hour
    if fault == "loop":
        assert "in endless_loop" in caplog.text
        assert f"rank {1 - rank} of tiny waits for others in phase 'passes'" in caplog.text
    with pytest.raises(GroupLost, match="not loaded"):
        await _run(group, _tick(3))
    await group.rebuild()
    assert await _sum(group, _tick(1)) == 3.0


async def test_ranks_that_find_no_room_are_not_waited_for_without_end(ray_cluster: None) -> None:
    homeless = RayGroup(CONFIG.model_copy(update={"device": "cuda", "load_deadline_s": 1.0}), GLOO)
    with pytest.raises(LoadError, match="tiny: no room for its ranks after 1 s"):
        await homeless.start()
