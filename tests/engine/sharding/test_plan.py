"""What ``twinkle-serve plan`` computes for a rank of several is what that rank's engine takes."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.engine.sharding import remote
from tests.engine.sharding.conftest import sharded
from twinkle_serve.config import ModelConfig
from twinkle_serve.plan import Budget, budget_of, find_shapes
from twinkle_serve.testing.crew import Crew

SIZES = {"max_resident_adapters": 2, "max_rank": 8, "sampler": {"kv_cache_tokens": 1024}}


def _both(config: ModelConfig, crew: Crew) -> tuple[Budget, list[dict[str, int]]]:
    crew.run(remote.start_afresh, config)
    return budget_of(config, find_shapes(config.path)), crew.run(remote.memory, config)


@pytest.mark.parametrize("size", ["two", "four"])
def test_under_expert_parallelism_every_byte_is_foreseen(
    request: pytest.FixtureRequest, moe8: Path, size: str
) -> None:
    crew: Crew = request.getfixturevalue(size)
    budget, ranks = _both(sharded(moe8, len(crew.places), "expert_parallel", **SIZES), crew)
    for memory in ranks:
        assert budget.part("base") == memory["base"]
        assert sum(line.num_bytes for line in budget.lines if line.what == "experts") == memory["experts"]
        assert budget.part("slots") == memory["slots"]
        assert budget.part("adam") == memory["moments"]
        assert budget.part("kv") == memory["kv"]


def test_under_zero3_only_padding_and_the_layers_at_work_come_on_top(two: Crew, tiny_llama: Path) -> None:
    budget, ranks = _both(sharded(tiny_llama, 2, "zero3", **SIZES), two)
    gathered = sum(line.num_bytes for line in budget.lines if line.what == "gathered layers")
    for memory in ranks:
        assert budget.part("base") - gathered == pytest.approx(memory["base"], rel=0.01)
        assert budget.part("slots") == memory["slots"]
        assert budget.part("kv") == memory["kv"]
