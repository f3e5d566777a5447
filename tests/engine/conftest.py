"""Engines on tiny models: loaded once a session, handed to each test with empty slots."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from transformers import (
    Glm4MoeConfig,
    MixtralConfig,
    OlmoeConfig,
    PhimoeConfig,
    PretrainedConfig,
    Qwen2MoeConfig,
    Qwen3MoeConfig,
)

from twinkle_serve.config import ModelConfig
from twinkle_serve.engine.engine import Engine
from twinkle_serve.testing.models import _attention, _build_random

EngineFactory = Callable[..., Engine]


@pytest.fixture(scope="session")
def tiny_mixtral(models_root: Path) -> Path:
    """Random Mixtral: 350 words, 2 layers of 64, 4 experts of which 2 answer."""
    config = MixtralConfig(
        **_attention(64, 2),
        vocab_size=350,
        intermediate_size=32,
        num_local_experts=4,
        num_experts_per_tok=2,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
    )
    return _build_random(models_root, "mixtral", config, seed=0)


def mixtures() -> dict[str, PretrainedConfig]:
    """Random mixtures of every family that is served, some with dense layers and shared experts."""
    common: dict[str, Any] = _attention(64, 2) | {"vocab_size": 350, "intermediate_size": 48}
    chosen = {"num_experts": 4, "num_experts_per_tok": 2}
    inner = {"moe_intermediate_size": 16}
    shared = {"shared_expert_intermediate_size": 24}
    routed = {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1}
    local = {"num_local_experts": 4, "num_experts_per_tok": 2}
    return {
        "qwen3_moe": Qwen3MoeConfig(**common, **inner, **chosen),
        "qwen3_moe-dense_layer": Qwen3MoeConfig(**common, **inner, **chosen, mlp_only_layers=[1]),
        "mixtral": MixtralConfig(**common, **local),
        "olmoe": OlmoeConfig(**common, **chosen),
        "qwen2_moe": Qwen2MoeConfig(**common, **inner, **shared, **chosen),
        "qwen2_moe-dense_layer": Qwen2MoeConfig(**common, **inner, **shared, **chosen, mlp_only_layers=[0]),
        "glm4_moe": Glm4MoeConfig(**common, **inner, **routed, first_k_dense_replace=1, pad_token_id=0),
        "phimoe": PhimoeConfig(**common, **local),
    }


@pytest.fixture(scope="session", params=mixtures())
def mixture(request: pytest.FixtureRequest, models_root: Path) -> Path:
    """The directory of each of ``mixtures`` in turn."""
    return _build_random(models_root, request.param, mixtures()[request.param], seed=0)


@pytest.fixture(scope="session")
def _engines() -> Iterator[dict[str, Engine]]:
    engines: dict[str, Engine] = {}
    yield engines
    for engine in engines.values():
        engine.close()


@pytest.fixture
def engine_for(_engines: dict[str, Engine]) -> EngineFactory:
    """``engine_for(directory, **fields of ModelConfig)``: an engine with all slots free and nothing paged."""

    def find(directory: Path, **fields: Any) -> Engine:
        fields.setdefault("dtype", "float32")  # on a GPU too, where "auto" is bfloat16
        config = ModelConfig(name="tiny", path=str(directory), num_threads=1, **fields)
        key = config.model_dump_json()
        if key not in _engines:
            _engines[key] = Engine(config)
        engine = _engines[key]
        for slot in range(engine.pool.num_slots):
            engine.pool.free(slot)
        return engine

    return find


@pytest.fixture
def moe(engine_for: EngineFactory, tiny_moe: Path) -> Engine:
    return engine_for(tiny_moe)


@pytest.fixture
def deterministic_moe(engine_for: EngineFactory, tiny_moe: Path) -> Engine:
    return engine_for(tiny_moe, deterministic=True)
