"""Crews of two and four ranks, started once; a model whose experts they can share; one rank beside them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.engine.conftest import EngineFactory
from tests.engine.sharding import remote
from tests.engine.sharding.compare import Both
from twinkle_serve.config import ModelConfig
from twinkle_serve.testing.crew import Crew, crew

BothFactory = Callable[..., Both]


@pytest.fixture(scope="session")
def two() -> Iterator[Crew]:
    with crew(2) as ranks:
        yield ranks
        ranks.run(remote.close_all)


@pytest.fixture(scope="session")
def four() -> Iterator[Crew]:
    with crew(4) as ranks:
        yield ranks
        ranks.run(remote.close_all)


@pytest.fixture(scope="session")
def moe8(models_root: Path) -> Path:
    """Random Qwen3-MoE with 8 experts, of which 2 answer."""
    from twinkle_serve.testing.models import build_tiny_qwen3_moe

    return build_tiny_qwen3_moe(models_root, num_experts=8)


def sharded(directory: Path, ranks: int, sharding: str, **fields: Any) -> ModelConfig:
    fields.setdefault("dtype", "float32")
    return ModelConfig.model_validate(
        {"name": "tiny", "path": str(directory), "num_threads": 1, "ranks": ranks, "sharding": sharding}
        | fields
    )


@pytest.fixture
def both(engine_for: EngineFactory, two: Crew, moe8: Path) -> BothFactory:
    """``both(sharding, **fields of ModelConfig)``: two ranks and one, with empty slots."""

    def find(sharding: str, directory: Path = moe8, ranks: Crew = two, **fields: Any) -> Both:
        config = sharded(directory, len(ranks.places), sharding, **fields)
        ranks.run(remote.start_afresh, config)
        return Both(engine_for(directory, **fields), ranks, config)

    return find
