"""The straight line of operators against the base model's own modules."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import Gemma3TextConfig, Olmo2Config, Olmo3Config, OlmoeConfig, PretrainedConfig

from tests.engine import reference
from tests.engine.conftest import EngineFactory
from tests.engine.sampling import PROMPT, greedy, trained
from tests.engine.ticks import VOCAB_SIZE, make_sample, run, sample, value
from twinkle_serve.engine import inference, inference_mlp
from twinkle_serve.engine.engine import Engine
from twinkle_serve.engine.inference import Inference
from twinkle_serve.engine.inference_mlp import ExpertsMlp
from twinkle_serve.engine.kv_cache import KVCache, PrefillAttend, Rows
from twinkle_serve.engine.sample_pass import SamplePass
from twinkle_serve.protocol.data import LoraSpec
from twinkle_serve.testing.models import _build_random, build_tiny_qwen3_moe

MODELS = ["tiny_moe", "tiny_mixtral", "tiny_qwen3", "tiny_llama"]
SMALL = {
    "vocab_size": 350,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}


def prefill_attend(engine: Engine, length: int) -> PrefillAttend:
    shape = engine.base.model.config
    cache = KVCache(
        shape.num_hidden_layers,
        64,
        shape.num_key_value_heads,
        shape.head_dim,
        engine.base.dtype,
        engine.base.device,
    )
    rows = Rows()
    cache.grow(rows, length)
    return PrefillAttend(cache, [(rows, 0, length)])


def hidden_of(engine: Engine, line: Inference | None) -> torch.Tensor:
    """Of one sequence of 20 tokens, by the straight line, or by the modules if it is None."""
    tokens = torch.arange(20) * 7 % VOCAB_SIZE
    attend = prefill_attend(engine, 20)
    engine.base.segments.set({})
    with torch.no_grad():
        if line is None:
            return engine.base.hidden_states(tokens, torch.arange(20), attend)
        return line.hidden_states(tokens, torch.arange(20), attend)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("model", MODELS)
def test_hidden_states_are_those_of_the_modules(
    model: str, dtype: str, request: pytest.FixtureRequest, engine_for: EngineFactory
) -> None:
    engine = engine_for(request.getfixturevalue(model), dtype=dtype)
    line = Inference.of(engine.base)
    assert line is not None
    found, expected = hidden_of(engine, line), hidden_of(engine, None)
    tolerance = 2e-6 if dtype == "float32" else 0.03
    assert ((found - expected).abs().max() / expected.abs().max()).item() <= tolerance
    logits = line.logits(found, ())
    torch.testing.assert_close(logits, engine.base.full_logits(found, ()), atol=1e-5, rtol=1e-5)


def test_a_mixture_that_weighs_its_experts_otherwise_is_noticed_in_bfloat16_too(
    models_root: Path, engine_for: EngineFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No element differs by more than where rounding sends a row to another expert, but all rows do."""
    engine = engine_for(build_tiny_qwen3_moe(models_root, num_experts=3), dtype="bfloat16")
    assert Inference.of(engine.base) is not None
    monkeypatch.setattr(
        inference_mlp, "ExpertsMlp", lambda **fields: ExpertsMlp(**fields | {"normalized": False})
    )
    assert Inference.of(engine.base) is None


def test_numbers_that_disagree_are_not_used(moe: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    right = inference.Norm.__call__
    monkeypatch.setattr(inference.Norm, "__call__", lambda self, x: right(self, x) * 1.01)
    assert Inference.of(moe.base) is None


def test_a_layer_with_something_else_in_it_is_not_recognized(
    moe: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = moe.base.model.base_model.layers[1]
    monkeypatch.setitem(layer._modules, "another", nn.Identity())
    assert Inference.of(moe.base) is None


@pytest.mark.parametrize(
    "config",
    [
        Olmo2Config(**SMALL),  # no norm before attention; norms of query and key over all heads
        Olmo3Config(**SMALL),  # besides, a rotation for each kind of layer
        OlmoeConfig(**SMALL, num_experts=4, num_experts_per_tok=2),  # usual names, but the same norms
        Gemma3TextConfig(**SMALL, head_dim=8),
    ],
)
def test_models_with_other_layers_are_sampled_through_their_modules(
    config: PretrainedConfig, tmp_path: Path, engine_for: EngineFactory
) -> None:
    directory = _build_random(tmp_path, config.model_type, config, seed=0)
    engine = engine_for(directory)
    assert Inference.of(engine.base) is None
    assert not engine._sampler._pass.is_straight
    (sequence,) = sample(engine, PROMPT, max_tokens=6, temperature=0.0).sequences
    plain = reference.plain(reference.load_model(directory))
    assert sequence.tokens.tolist() == greedy(plain, PROMPT, 6)


def test_a_rotation_for_each_kind_of_layer_is_not_recognized(
    moe: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its frequencies have other names, and it cannot be asked without the kind."""
    monkeypatch.delattr(moe.base.model.base_model.rotary_emb, "inv_freq")
    assert Inference.of(moe.base) is None


@pytest.mark.parametrize("model", ["tiny_moe", "tiny_mixtral"])
def test_a_model_without_a_straight_line_is_sampled_through_its_modules(
    engine_for: EngineFactory, model: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same tokens and logprobs, adapters included."""
    directory = request.getfixturevalue(model)
    usual = engine_for(directory)
    assert usual._sampler._pass.is_straight
    other = engine_for(directory, max_resident_adapters=3)
    monkeypatch.setattr(Inference, "of", classmethod(lambda cls, base: None))
    plain = SamplePass(other.base, other._adapters.pool)
    assert not plain.is_straight
    monkeypatch.setattr(other._sampler, "_pass", plain)
    found = []
    for engine in (usual, other):
        refs = [trained(engine, slot, LoraSpec(rank=3 + slot, seed=slot), f"both{slot}") for slot in range(2)]
        samples = [
            make_sample(f"{i}", [i, *PROMPT], ref, max_tokens=12, seed=i) for i, ref in enumerate(refs)
        ]
        samples.append(make_sample("base", PROMPT, max_tokens=12, seed=9))
        outcomes = run(engine, samples=tuple(samples), decode_budget_s=60)
        found.append({name: value(outcome).sequences[0] for name, outcome in outcomes.items()})
    straight, modules = found
    for name, sequence in straight.items():
        assert sequence.tokens.tolist() == modules[name].tokens.tolist()
        assert sequence.logprobs == pytest.approx(modules[name].logprobs, abs=1e-5)
