"""Packed frozen weights against the plain products, for any number of rows and through a whole step."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from tests.engine.conftest import EngineFactory
from tests.engine.ticks import create, make_pass, run_passes, tensors, value
from twinkle_serve.config import ModelConfig
from twinkle_serve.engine.base_model import UnsupportedModel, load_base_model
from twinkle_serve.engine.frozen import (
    expert_product,
    expert_product_back,
    matrices,
    pack,
    packed,
    product,
    product_back,
    product_into,
)
from twinkle_serve.engine.layers import LoraLinear, Segments
from twinkle_serve.protocol.data import Column, DatumBatch, LoraSpec
from twinkle_serve.testing.models import build_tiny_qwen3_moe

OUT, IN = 320, 256


def weights(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0)) / IN**0.5


@pytest.mark.parametrize("rows", [1, 2, 7, 64, 200])
def test_both_directions_equal_the_plain_products(rows: int) -> None:
    weight, bias = weights(OUT, IN), weights(OUT)
    plain = weight.clone()
    assert pack([weight]) == 1
    x, dy = torch.randn(rows, IN), torch.randn(rows, OUT)
    torch.testing.assert_close(product(x, weight, bias), x @ plain.t() + bias, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(product_back(dy, weight), dy @ plain, rtol=1e-5, atol=1e-5)


def test_an_expert_is_found_in_the_stack() -> None:
    stack = weights(3, OUT, IN)
    plain = stack.clone()
    assert pack([stack]) == 1
    x, dy = torch.randn(5, IN), torch.randn(5, OUT)
    forward, back = torch.empty(5, OUT), torch.empty(5, IN)
    for expert in range(3):
        expert_product(x, stack, expert, forward)
        expert_product_back(dy, stack, expert, back)
        torch.testing.assert_close(forward, x @ plain[expert].t(), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(back, dy @ plain[expert], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rows", [1, 2, 4, 8, 9])
@pytest.mark.parametrize("width", [16, 2048])
@pytest.mark.parametrize("is_packed", [False, True])
def test_a_product_of_few_rows_is_the_same_whichever_way(rows: int, width: int, is_packed: bool) -> None:
    x, weight = torch.randn(rows, 512), weights(width, 512)
    expected = x @ weight.t()
    if is_packed:
        pack([weight])
    (matrix,) = matrices(weight)
    assert (packed(matrix) is None) == (packed(weight) is None)
    wide = torch.full((rows, width + 3), 7.0)
    product_into(wide[:, :width], x, matrix)
    torch.testing.assert_close(wide[:, :width], expected, atol=1e-4, rtol=1e-5)
    assert (wide[:, width:] == 7).all()


def test_small_weights_stay_as_they_are() -> None:
    weight = weights(OUT, 64)
    assert pack([weight]) == 0
    assert packed(weight) is None
    x = torch.randn(4, 64)
    assert torch.equal(product(x, weight), x @ weight.t())


def test_a_packed_layer_without_adapters_still_passes_gradients_on() -> None:
    base = nn.Linear(IN, OUT).requires_grad_(False)
    segments = Segments()
    layer = LoraLinear(base, segments, "attn", 0)
    x = torch.randn(3, IN, requires_grad=True)
    (expected,) = torch.autograd.grad(layer(x).square().sum(), x)
    pack([base.weight])
    (found,) = torch.autograd.grad(layer(x).square().sum(), x)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_a_step_of_a_packed_model_equals_that_of_a_plain_one(
    engine_for: EngineFactory, models_root: Path
) -> None:
    directory = build_tiny_qwen3_moe(
        models_root, vocab_size=512, hidden_size=256, num_layers=2, num_experts=4, expert_size=256
    )
    draw = np.random.default_rng(0)
    lengths, widths = np.array([9, 30]), np.zeros(2, np.int32)
    columns = {
        "target_tokens": Column(draw.integers(0, 512, 39), widths),
        "weights": Column(np.ones(39, np.float32), widths),
    }
    batch = DatumBatch(draw.integers(0, 512, 39).astype(np.int32), lengths, columns)
    results = []
    for choice in ("on", "off"):
        engine = engine_for(directory, pack_weights=choice)
        assert (packed(engine.base.head.weight) is not None) == (choice == "on")
        create(engine, 0, LoraSpec(8, seed=1), moved=True)
        create(engine, 1, LoraSpec(4, seed=2, train_attn=False), moved=True)
        outcomes = run_passes(engine, [make_pass(f"p{slot}", slot, batch) for slot in (0, 1)])
        logprobs = [value(outcome).logprobs.values for outcome in outcomes.values()]
        results.append((logprobs, [tensors(engine, slot, "grads") for slot in (0, 1)]))
    (logprobs, grads), (plain_logprobs, plain_grads) = results
    np.testing.assert_allclose(np.concatenate(logprobs), np.concatenate(plain_logprobs), rtol=1e-5, atol=1e-5)
    for mine, plain in zip(grads, plain_grads, strict=True):
        for name, gradient in plain.items():
            scale = gradient.abs().max().clamp(min=1e-6)
            torch.testing.assert_close(mine[name] / scale, gradient / scale, rtol=1e-4, atol=1e-4, msg=name)


def test_what_cannot_be_packed_is_refused_by_name(tiny_moe: Path) -> None:
    config = ModelConfig(name="m", path=str(tiny_moe), dtype="bfloat16", pack_weights="on", num_threads=1)
    with pytest.raises(UnsupportedModel, match="pack_weights: on needs a float32 base model on the CPU"):
        load_base_model(config, tiny_moe)
