"""The straight line of operators against the base model's own modules."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from tests.engine.conftest import EngineFactory
from tests.engine.sampling import PROMPT, trained
from tests.engine.ticks import VOCAB_SIZE, make_sample, run, value
from twinkle_serve.engine import inference
from twinkle_serve.engine.engine import Engine
from twinkle_serve.engine.inference import Inference
from twinkle_serve.engine.kv_cache import KVCache, PrefillAttend, Rows
from twinkle_serve.engine.sample_pass import SamplePass
from twinkle_serve.protocol.data import LoraSpec

MODELS = ["tiny_moe", "tiny_qwen3", "tiny_llama"]


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


def test_a_model_without_a_straight_line_is_sampled_through_its_modules(
    engine_for: EngineFactory, tiny_moe: Path, moe: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same tokens and logprobs, adapters included."""
    other = engine_for(tiny_moe, max_resident_adapters=3)
    monkeypatch.setattr(Inference, "of", classmethod(lambda cls, base: None))
    plain = SamplePass(other.base, other._adapters.pool)
    assert not plain.is_straight
    monkeypatch.setattr(other._sampler, "_pass", plain)
    found = []
    for engine in (moe, other):
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
