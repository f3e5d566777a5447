"""LoRA on linear layers: values and gradients against dense weights and plain autograd."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from twinkle_serve.engine.layers import LoraLinear, Segments
from twinkle_serve.engine.layout import AdapterLayout, Target
from twinkle_serve.engine.slots import Adapter, Segment
from twinkle_serve.protocol.data import LoraSpec

IN, OUT = 12, 20
LAYOUT = AdapterLayout.build(
    [Target("linear", "other", "attn", 3, 5), Target("linear", "this", "mlp", IN, OUT)]
)


def adapter(rank: int, seed: int, *, frozen: bool = False, dtype: torch.dtype = torch.float32) -> Adapter:
    weights = torch.randn(rank, LAYOUT.row_size, generator=torch.Generator().manual_seed(seed)) * 0.3
    return Adapter(LAYOUT, LoraSpec(rank), weights, None if frozen else torch.zeros_like(weights), dtype)


def layer(*, bias: bool = True, dtype: torch.dtype = torch.float32) -> tuple[LoraLinear, Segments]:
    torch.manual_seed(0)
    base = nn.Linear(IN, OUT, bias=bias, dtype=dtype).requires_grad_(False)
    segments = Segments()
    return LoraLinear(base, segments, "mlp", 1), segments


def dense(
    lora: LoraLinear, x: torch.Tensor, parts: list[Segment]
) -> tuple[torch.Tensor, list[tuple[torch.Tensor, torch.Tensor]]]:
    """Row by row through W + (32 / r) B A, with leaves for the factors."""
    leaves, rows = [], list(x.new_zeros(x.shape[0], OUT).unbind())
    for row in range(x.shape[0]):
        rows[row] = lora.base(x[row])
    for owner, start, end in parts:
        a = owner.factors(1).a.clone().requires_grad_()
        b = owner.factors(1).b_t.t().clone().requires_grad_()
        delta = 32 / owner.spec.rank * b @ a
        for row in range(start, end):
            rows[row] = lora.base(x[row]) + delta @ x[row]
        leaves.append((a, b))
    return torch.stack(rows), leaves


@pytest.mark.parametrize("bias", [True, False])
def test_mixed_ranks_and_gaps_by_value_and_gradient(bias: bool) -> None:
    lora, segments = layer(bias=bias)
    parts = [Segment(adapter(1, 1), 0, 3), Segment(adapter(8, 2), 4, 5), Segment(adapter(5, 3), 5, 9)]
    segments.set({"mlp": parts})
    x = torch.randn(11, IN, requires_grad=True)
    y = lora(x)
    reference_x = x.detach().clone().requires_grad_()
    expected, leaves = dense(lora, reference_x, parts)
    torch.testing.assert_close(y, expected)

    dy = torch.randn(11, OUT)
    y.backward(dy)
    expected.backward(dy)
    torch.testing.assert_close(x.grad, reference_x.grad)
    for (owner, _, _), (a, b) in zip(parts, leaves, strict=True):
        factors = owner.factors(1)
        torch.testing.assert_close(factors.grad_a, a.grad)
        torch.testing.assert_close(factors.grad_b_t, b.grad.t())  # type: ignore[union-attr]


def test_gradients_add_to_what_is_there_and_touch_nothing_else() -> None:
    lora, segments = layer()
    owner, idle = adapter(4, 1), adapter(4, 2)
    segments.set({"mlp": [Segment(owner, 0, 2)]})
    x = torch.randn(2, IN, requires_grad=True)
    lora(x).sum().backward()
    assert owner.grads is not None
    once = owner.grads.clone()
    lora(x).sum().backward()
    torch.testing.assert_close(owner.grads, 2 * once)
    other = LAYOUT.targets[0]
    assert not LAYOUT.a(owner.grads, other).any()
    assert not LAYOUT.b_t(owner.grads, other).any()
    assert idle.grads is not None
    assert not idle.grads.any()


def test_without_segments_it_is_the_base_layer() -> None:
    lora, segments = layer()
    x = torch.randn(2, 3, IN)
    assert torch.equal(lora(x), lora.base(x))
    segments.set({"attn": [Segment(adapter(4, 1), 0, 3)]})  # of another group
    assert torch.equal(lora(x), lora.base(x))
    assert lora.weight is lora.base.weight
    assert lora.bias is lora.base.bias


def test_leading_dimensions_are_kept() -> None:
    lora, segments = layer()
    segments.set({"mlp": [Segment(adapter(4, 1), 0, 6)]})
    x = torch.randn(1, 6, IN)
    torch.testing.assert_close(lora(x)[0], lora(x[0]))


def test_a_segment_does_not_depend_on_its_neighbours() -> None:
    lora, segments = layer()
    owner, x = adapter(4, 1), torch.randn(8, IN)
    segments.set({"mlp": [Segment(adapter(32, 2), 0, 3), Segment(owner, 3, 8)]})
    together = lora(x)[3:]
    segments.set({"mlp": [Segment(owner, 0, 5)]})
    torch.testing.assert_close(together, lora(x[3:]), rtol=1e-6, atol=1e-6)


def test_bfloat16_base_keeps_gradients_in_float32() -> None:
    lora, segments = layer(dtype=torch.bfloat16)
    parts = [Segment(adapter(8, 1, dtype=torch.bfloat16), 0, 64)]
    segments.set({"mlp": parts})
    x = torch.randn(64, IN).bfloat16().requires_grad_()
    y = lora(x)
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    precise, precise_segments = layer()
    precise.base.load_state_dict(lora.base.state_dict())
    twin = adapter(8, 1)
    precise_segments.set({"mlp": [Segment(twin, 0, 64)]})
    precise(x.detach().float().requires_grad_()).sum().backward()
    grads, expected = parts[0].adapter.grads, twin.grads
    assert grads is not None
    assert expected is not None
    assert grads.dtype == torch.float32
    assert float((grads - expected).norm()) <= 0.02 * float(expected.norm())


def test_backward_through_a_frozen_adapter_is_our_bug() -> None:
    lora, segments = layer()
    segments.set({"mlp": [Segment(adapter(4, 1, frozen=True), 0, 2)]})
    y = lora(torch.randn(2, IN, requires_grad=True))
    with pytest.raises(AssertionError, match="frozen"):
        y.sum().backward()
