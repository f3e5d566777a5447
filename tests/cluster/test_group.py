"""RayGroup over real actors: outcomes stream, large values stay in the object store, lost ranks are named."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import ray

from twinkle_serve.cluster.group import LoadError, RayGroup
from twinkle_serve.config import ModelConfig
from twinkle_serve.control.group import GroupLost
from twinkle_serve.protocol.data import AdamParams
from twinkle_serve.protocol.work import OptimStep, Outcome, Pass, SaveAdapter, Tick, TickReport

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("ray_cluster")]
STANDIN = "tests.cluster.standin_engine:StandinEngine"


@asynccontextmanager
async def _started(config: ModelConfig, **changes: Any) -> AsyncIterator[RayGroup]:
    group = RayGroup(config.model_copy(update=changes), STANDIN)
    try:
        await group.start()
        yield group
    finally:
        group.kill()


def _pass(loss_fn: str, **loss_config: float) -> Pass:
    return Pass("p", 0, b"", loss_fn, loss_config, backward=True)


async def _run(group: RayGroup, tick: Tick) -> list[Outcome | TickReport]:
    return [item async for item in group.run(tick)]


async def test_outcomes_then_the_report(standin: ModelConfig) -> None:
    async with _started(standin) as group:
        assert group.ready
        assert group.info.name == "tiny"
        tick = Tick(7, passes=(_pass("fine"),), optim_steps=(OptimStep("o", 0, AdamParams()),))
        forward, step, report = await _run(group, tick)
    assert isinstance(forward, Outcome)
    assert forward.value.logprobs.values.tolist() == [0, 1, 2, 3]
    assert isinstance(step, Outcome)
    assert step.request_id == "o"
    assert report == TickReport(7, {"all": 0.0})


async def test_a_large_value_is_an_object_reference_that_outlives_the_worker(standin: ModelConfig) -> None:
    async with _started(standin) as group:
        large = replace(_pass("fine", floats=100_000), datums=bytes(100_000))
        outcome, _ = await _run(group, Tick(1, passes=(large,)))
    assert isinstance(outcome, Outcome)
    assert isinstance(outcome.value, ray.ObjectRef)
    result = await outcome.value
    assert result.logprobs.values[99_999] == 99_999
    assert not result.logprobs.values.flags.owndata  # mapped, not copied


async def test_a_rank_that_dies_while_a_large_value_is_stored_is_lost(standin: ModelConfig) -> None:
    async with _started(standin) as group:
        # A long tick, which is streamed: its last outcome would otherwise be missed without a word.
        tick = Tick(1, passes=(replace(_pass("die when stored"), datums=bytes(100_000)), _pass("fine")))
        with pytest.raises(GroupLost, match=r"rank 0 of tiny: .*died"):
            await _run(group, tick)


async def test_the_outcome_of_a_save_may_come_in_a_later_tick(standin: ModelConfig) -> None:
    async with _started(standin) as group:
        save = SaveAdapter("s", 0, "/nowhere", optimizer=True, manifest={})
        assert await _run(group, Tick(1, saves=(save,))) == [TickReport(1, {"all": 0.0})]
        assert await _run(group, Tick(2)) == [Outcome("s", 42, num_bytes=8), TickReport(2, {"all": 0.0})]


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize(
    ("fault", "deadline_s", "message"),
    [
        ("die", 60.0, r"rank \d of tiny: .*died"),
        ("raise", 60.0, r"rank \d of tiny: planted"),
        ("hang", 1.0, r"rank \d of tiny has made no progress for \d.\d s in phase 'start' of tick 2"),
    ],
)
async def test_a_lost_rank_ends_the_group_which_can_be_rebuilt(
    standin: ModelConfig, fault: str, deadline_s: float, message: str, ranks: int
) -> None:
    async with _started(standin, stall_deadline_s=deadline_s, ranks=ranks) as group:
        step = Tick(1, optim_steps=(OptimStep("o", 0, AdamParams()),))
        (before, _) = await _run(group, step)
        workers = list(group._workers)
        with pytest.raises(GroupLost, match=message):
            await _run(group, Tick(2, passes=(_pass(fault),)))
        assert not group.ready
        for worker in workers:
            with pytest.raises(ray.exceptions.RayActorError):
                await worker.load.remote()
        with pytest.raises(GroupLost, match="not loaded"):
            await _run(group, step)
        await group.rebuild()
        (after, _) = await _run(group, step)
        assert isinstance(before, Outcome)
        assert isinstance(after, Outcome)
        assert before.value != after.value  # another process


@pytest.mark.parametrize(
    ("path", "reason"), [("missing", "no config.json$"), ("broken", "cannot step"), ("deadly", "died")]
)
async def test_a_model_that_does_not_load_gives_one_line(
    standin: ModelConfig, path: str, reason: str
) -> None:
    with pytest.raises(LoadError, match=rf"cannot load tiny from {path}: .*{reason}"):
        async with _started(standin, path=path):
            pass


@pytest.mark.parametrize("busy", [False, True])
async def test_stopping_closes_the_engine_unless_it_is_stuck(
    standin: ModelConfig, tmp_path: Path, busy: bool
) -> None:
    async with _started(standin, path=str(tmp_path / "model"), ranks=2) as group:
        (worker, _) = group._workers
        if busy:
            worker.run_tick.remote(Tick(1, passes=(_pass("hang"),)))
        await group.stop()
        assert (tmp_path / "model.closed").exists()  # by the other rank at least
        with pytest.raises(ray.exceptions.RayActorError):
            await worker.load.remote()


async def test_only_the_first_rank_speaks(standin: ModelConfig) -> None:
    async with _started(standin, ranks=2) as group:
        assert len(await _run(group, Tick(1, passes=(_pass("fine"),)))) == 2
