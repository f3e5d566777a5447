"""Grouped products against the loop over segments, which other tests compare with plain torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from tests.engine.conftest import EngineFactory
from tests.engine.ticks import (
    create,
    make_pass,
    random_batch,
    run_passes,
    sample,
    snapshot,
    tensors,
    value,
)
from twinkle_serve.engine.base_model import UnsupportedModel
from twinkle_serve.engine.experts import ExpertTargets, experts_forward
from twinkle_serve.engine.grouped import Stretches, fits
from twinkle_serve.engine.layers import LoraLinear, Segments
from twinkle_serve.engine.layout import AdapterLayout, Target
from twinkle_serve.engine.slots import Adapter, Segment, SlotPool
from twinkle_serve.protocol.data import LoraSpec
from twinkle_serve.testing.models import build_tiny_qwen3_moe

HIDDEN, INNER, NUM_EXPERTS, TOP_K = 32, 16, 4, 2
LAYOUT = AdapterLayout.build(
    [
        Target("linear", "q_proj", "attn", HIDDEN, 48),
        Target("expert_gate", "experts", "mlp", HIDDEN, INNER, NUM_EXPERTS),
        Target("expert_up", "experts", "mlp", HIDDEN, INNER, NUM_EXPERTS),
        Target("expert_down", "experts", "mlp", INNER, HIDDEN, NUM_EXPERTS),
    ]
)
# Gaps before, between and behind; ranks that are no multiple of anything; an adapter that comes twice.
LENGTHS = [(None, 3), (0, 5), (1, 1), (None, 4), (2, 9), (0, 2), (None, 2)]
NUM_ROWS = sum(length for _, length in LENGTHS)


def adapters() -> list[Adapter]:
    made = []
    for seed, rank in enumerate((3, 8, 32)):
        weights = torch.randn(rank, LAYOUT.row_size, generator=torch.Generator().manual_seed(seed)) * 0.1
        made.append(Adapter(LAYOUT, LoraSpec(rank), weights, torch.zeros_like(weights)))
    return made


def segments(owners: Sequence[Adapter]) -> list[Segment]:
    found, position = [], 0
    for owner, length in LENGTHS:
        if owner is not None:
            found.append(Segment(owners[owner], position, position + length))
        position += length
    return found


class Experts(nn.Module):
    def __init__(self, activation: nn.Module) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.num_experts = NUM_EXPERTS
        self.gate_up_proj = nn.Parameter(torch.randn(NUM_EXPERTS, 2 * INNER, HIDDEN), requires_grad=False)
        self.down_proj = nn.Parameter(torch.randn(NUM_EXPERTS, HIDDEN, INNER), requires_grad=False)
        self.act_fn = activation


Result = tuple[torch.Tensor, list[torch.Tensor]]


def both(group: str, build: Callable[[Segments], Callable[..., torch.Tensor]], *inputs: torch.Tensor) -> None:
    """Run forward and backward by loop and by groups; outputs and all gradients must agree."""
    results: list[Result] = []
    for grouped in (False, True):
        owners = adapters()
        shared = Segments(grouped)
        shared.set({group: segments(owners)})  # type: ignore[dict-item]
        leaves = [x.clone().requires_grad_(x.is_floating_point()) for x in inputs]
        y = build(shared)(*leaves)
        y.backward(torch.randn(y.shape, generator=torch.Generator().manual_seed(9)))
        gradients = [leaf.grad for leaf in leaves if leaf.grad is not None]
        results.append((y.detach(), gradients + [o.grads for o in owners if o.grads is not None]))
    (expected, expected_gradients), (found, found_gradients) = results
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert any(gradient.abs().max() > 0 for gradient in expected_gradients[-3:])
    for ours, theirs in zip(found_gradients, expected_gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("bias", [True, False])
def test_linear(bias: bool) -> None:
    torch.manual_seed(0)
    base = nn.Linear(HIDDEN, 48, bias=bias).requires_grad_(False)
    both("attn", lambda shared: LoraLinear(base, shared, "attn", 0), torch.randn(1, NUM_ROWS, HIDDEN))


@pytest.mark.parametrize("activation", [nn.SiLU(), nn.GELU()])
def test_experts(activation: nn.Module) -> None:
    torch.manual_seed(0)
    index = torch.stack([torch.randperm(NUM_EXPERTS)[:TOP_K] for _ in range(NUM_ROWS)])
    index[index == 3] = 1  # expert 3 gets nothing, expert 1 maybe the same token twice

    def build(shared: Segments) -> Callable[..., torch.Tensor]:
        module = Experts(activation)
        module.twinkle_targets = ExpertTargets(shared, 1, 2, 3)  # type: ignore[assignment]
        return lambda x, w: experts_forward(module, x, index, w)

    both("mlp", build, torch.randn(NUM_ROWS, HIDDEN), torch.rand(NUM_ROWS, TOP_K))


def test_a_batch_without_adapters_is_the_base_model() -> None:
    base = nn.Linear(HIDDEN, 48).requires_grad_(False)
    shared = Segments(grouped=True)
    shared.set({"attn": []})
    x = torch.randn(5, HIDDEN)
    torch.testing.assert_close(LoraLinear(base, shared, "attn", 0)(x), base(x))


def test_scales_are_exact_in_bfloat16() -> None:
    """32 / 3 is no number of bfloat16, so that rounding it would scale all of a run by 1.002."""
    owners = adapters()
    stretches = Stretches.of(segments(owners), NUM_ROWS, torch.empty(0, dtype=torch.bfloat16))
    hidden = torch.randn(NUM_ROWS, 32, generator=torch.Generator().manual_seed(0)).bfloat16()
    scales = torch.zeros(NUM_ROWS, 1)
    for adapter, start, end in segments(owners):
        scales[start:end] = adapter.scale
    expected = (hidden.float() * scales).bfloat16()
    assert torch.equal(stretches.scale(hidden.clone()), expected)
    rounded = hidden * scales.bfloat16()
    assert not torch.equal(rounded, expected)


def test_odd_widths_do_not_fit() -> None:
    assert fits(LAYOUT, torch.bfloat16)
    odd = AdapterLayout.build([Target("linear", "q_proj", "attn", HIDDEN, 30)])
    assert not fits(odd, torch.float32)
    assert fits(AdapterLayout.build([Target("linear", "q_proj", "attn", HIDDEN, 12)]), torch.float32)


def test_an_engine_with_grouped_products_trains_and_samples_the_same(
    engine_for: EngineFactory, tiny_moe: Path
) -> None:
    results = []
    for kernels in ("loop", "grouped"):
        engine = engine_for(tiny_moe, kernels=kernels)
        generator = np.random.default_rng(0)
        specs = [LoraSpec(3, 1), LoraSpec(8, 2, train_attn=False), LoraSpec(32, 3, train_mlp=False)]
        for slot, spec in enumerate(specs):
            create(engine, slot, spec, moved=True)
        batches = [random_batch(generator, [5, 9]) for _ in specs]
        passes = [make_pass(f"{slot}", slot, batch) for slot, batch in enumerate(batches)]
        outcomes = run_passes(engine, passes)
        gradients = {
            (slot, key): gradient
            for slot in range(3)
            for key, gradient in tensors(engine, slot, "grads").items()
        }
        ref = snapshot(engine, 0, "grouped")
        (sampled,) = sample(engine, [5, 6, 7], ref, max_tokens=8, temperature=0.0).sequences
        results.append(
            ([value(outcomes[f"{slot}"]) for slot in range(3)], gradients, sampled.tokens.tolist())
        )
    (expected, expected_gradients, expected_tokens), (found, gradients, tokens) = results
    assert tokens == expected_tokens
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.logprobs.values == pytest.approx(theirs.logprobs.values, abs=1e-5)
    assert gradients.keys() == expected_gradients.keys()
    for key, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected_gradients[key], rtol=1e-4, atol=1e-4)


def test_a_diverged_neighbour_in_the_pool_does_not_reach_rows_without_an_adapter(
    engine_for: EngineFactory, tiny_moe: Path
) -> None:
    """Groups without an adapter read some slot of the pool; what is there must not matter."""
    engine = engine_for(tiny_moe, kernels="grouped")
    create(engine, 0, LoraSpec(8, 1), moved=True)
    create(engine, 1, LoraSpec(8, 2, train_mlp=False, train_attn=False), moved=True)
    batch = random_batch(np.random.default_rng(0), [5, 9])
    passes = [make_pass("0", 0, batch), make_pass("1", 1, batch)]
    expected = value(run_passes(engine, passes)["1"])
    gradients = tensors(engine, 1, "grads")
    for slot in (0, 1):
        engine.pool.clear_grads(slot)
    engine.pool.blocks(0)[0].fill_(float("nan"))
    outcomes = run_passes(engine, passes)
    assert outcomes["0"].failure is not None
    assert value(outcomes["1"]).logprobs.values.tolist() == expected.logprobs.values.tolist()
    for key, gradient in tensors(engine, 1, "grads").items():
        assert torch.equal(gradient, gradients[key])


def test_rows_that_are_not_finite_leave_nothing_for_the_next_run_in_the_slot() -> None:
    """Gradients are padded to the largest rank of the batch, and zero times NaN is NaN."""
    pool = SlotPool(LAYOUT, 2, 16, torch.device("cpu"))
    pool.create(0, LoraSpec(4, 1))
    pool.create(1, LoraSpec(16, 2))
    shared = Segments(grouped=True)
    shared.set({"attn": [Segment(pool.adapter(0), 0, 5), Segment(pool.adapter(1), 5, 9)]})
    base = nn.Linear(HIDDEN, 48).requires_grad_(False)
    x = torch.randn(1, 9, HIDDEN)
    x[:, :5] = float("nan")
    LoraLinear(base, shared, "attn", 0)(x.requires_grad_()).sum().backward()
    assert pool.grads[0, :4].isnan().any()
    assert pool.blocks(1)[1].isfinite().all()
    pool.clear_grads(0)
    pool.free(0)
    pool.create(0, LoraSpec(16, 3))
    assert not pool.blocks(0)[1].any()


def test_packed_weights_go_with_grouped_products(engine_for: EngineFactory, models_root: Path) -> None:
    """A packed layer takes the same path with and without adapters; grouped products need some."""
    directory = build_tiny_qwen3_moe(
        models_root, vocab_size=512, hidden_size=256, num_layers=2, num_experts=4, expert_size=256
    )
    engine = engine_for(directory, kernels="grouped", pack_weights="on")
    plain = engine_for(directory, kernels="loop", pack_weights="off")
    found, expected = (sample(e, [5, 6, 7], None, max_tokens=4, temperature=0.0) for e in (engine, plain))
    assert found.sequences[0].tokens.tolist() == expected.sequences[0].tokens.tolist()


def test_grouped_products_that_do_not_fit_are_refused(
    engine_for: EngineFactory, tiny_moe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("twinkle_serve.engine.base_model.fits", lambda layout, dtype: False)
    with pytest.raises(UnsupportedModel, match="multiples of 16 bytes"):
        engine_for(tiny_moe, kernels="grouped", max_rank=31)
