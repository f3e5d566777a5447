"""LoRA on fused experts: routing, and values and gradients against one token at a time in plain autograd."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from twinkle_serve.engine.experts import ExpertTargets, experts_forward, route
from twinkle_serve.engine.layers import Segments
from twinkle_serve.engine.layout import AdapterLayout, Target
from twinkle_serve.engine.slots import Adapter, Segment
from twinkle_serve.protocol.data import LoraSpec

HIDDEN, INNER, NUM_EXPERTS = 10, 6, 5
LAYOUT = AdapterLayout.build(
    [
        Target("expert_gate", "experts", "mlp", HIDDEN, INNER, NUM_EXPERTS),
        Target("expert_up", "experts", "mlp", HIDDEN, INNER, NUM_EXPERTS),
        Target("expert_down", "experts", "mlp", INNER, HIDDEN, NUM_EXPERTS),
    ]
)


class Experts(nn.Module):
    """What transformers' fused expert modules offer."""

    def __init__(self, act_fn: nn.Module, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)

        def weights(*shape: int) -> nn.Parameter:
            values = 0.4 * torch.randn(shape, generator=generator)
            return nn.Parameter(values.to(dtype), requires_grad=False)

        self.num_experts = NUM_EXPERTS
        self.gate_up_proj = weights(NUM_EXPERTS, 2 * INNER, HIDDEN)
        self.down_proj = weights(NUM_EXPERTS, HIDDEN, INNER)
        self.act_fn = act_fn
        self.segments = Segments()
        self.twinkle_targets = ExpertTargets(self.segments, 0, 1, 2)


def adapter(rank: int, seed: int, dtype: torch.dtype = torch.float32) -> Adapter:
    weights = torch.randn(rank, LAYOUT.row_size, generator=torch.Generator().manual_seed(seed)) * 0.1
    return Adapter(LAYOUT, LoraSpec(rank), weights, torch.zeros_like(weights), dtype)


def one_token(
    module: Experts,
    x: torch.Tensor,
    experts: list[int],
    weights: torch.Tensor,
    block: torch.Tensor | None,
    scale: float,
) -> torch.Tensor:
    """The definition: hidden-side factors shared by the experts, the others each expert's own."""
    out = torch.zeros(HIDDEN)
    for weight, e in zip(weights, experts, strict=True):
        gate_w, up_w = module.gate_up_proj[e, :INNER], module.gate_up_proj[e, INNER:]
        down_w = module.down_proj[e]
        if block is not None:
            gate, up, down = LAYOUT.targets
            own = slice(e * INNER, (e + 1) * INNER)
            gate_w = gate_w + scale * LAYOUT.b_t(block, gate)[:, own].t() @ LAYOUT.a(block, gate)
            up_w = up_w + scale * LAYOUT.b_t(block, up)[:, own].t() @ LAYOUT.a(block, up)
            down_w = down_w + scale * LAYOUT.b_t(block, down).t() @ LAYOUT.a(block, down)[:, own]
        out = out + weight * (down_w @ (module.act_fn(gate_w @ x) * (up_w @ x)))
    return out


def routing(num_tokens: int, top_k: int, seed: int, skip: int | None = None) -> torch.Tensor:
    scores = torch.rand(num_tokens, NUM_EXPERTS, generator=torch.Generator().manual_seed(seed))
    if skip is not None:
        scores[:, skip] = -1
    return scores.topk(top_k, dim=1).indices


@pytest.mark.parametrize("act_fn", [nn.SiLU(), nn.GELU()], ids=["silu", "gelu"])
def test_value_and_all_gradients(act_fn: nn.Module) -> None:
    torch.manual_seed(0)
    module = Experts(act_fn)
    parts = [Segment(adapter(3, 1), 0, 4), Segment(adapter(8, 2), 4, 5), Segment(adapter(1, 3), 7, 10)]
    module.segments.set({"mlp": parts})
    index = routing(12, 2, 0, skip=3)  # expert 3 gets nothing, rows 5, 6, 10, 11 have no adapter
    x = torch.randn(12, HIDDEN, requires_grad=True)
    weights = torch.rand(12, 2, requires_grad=True)
    y = experts_forward(module, x, index, weights)

    x2, weights2 = (t.detach().clone().requires_grad_() for t in (x, weights))
    blocks = [part.adapter.weights.clone().requires_grad_() for part in parts]
    rows = []
    for token in range(12):
        owner = next((i for i, part in enumerate(parts) if part.start <= token < part.end), None)
        block = None if owner is None else blocks[owner]
        scale = 0.0 if owner is None else 32 / parts[owner].adapter.spec.rank
        rows.append(one_token(module, x2[token], index[token].tolist(), weights2[token], block, scale))
    expected = torch.stack(rows)
    torch.testing.assert_close(y, expected)

    dy = torch.randn(12, HIDDEN)
    y.backward(dy)
    expected.backward(dy)
    torch.testing.assert_close(x.grad, x2.grad, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(weights.grad, weights2.grad, rtol=1e-5, atol=1e-5)
    for part, block in zip(parts, blocks, strict=True):
        torch.testing.assert_close(part.adapter.grads, block.grad, rtol=1e-4, atol=1e-5)


def test_without_any_adapter_it_is_the_base_forward_and_backward() -> None:
    torch.manual_seed(0)
    module = Experts(nn.SiLU())
    module.segments.set({})
    index, weights = routing(7, 2, 1), torch.rand(7, 2, requires_grad=True)
    x = torch.randn(7, HIDDEN, requires_grad=True)
    y = experts_forward(module, x, index, weights)
    x2, weights2 = (t.detach().clone().requires_grad_() for t in (x, weights))
    expected = torch.stack(
        [one_token(module, x2[t], index[t].tolist(), weights2[t], None, 0.0) for t in range(7)]
    )
    torch.testing.assert_close(y, expected)
    y.square().sum().backward()
    expected.square().sum().backward()
    torch.testing.assert_close(x.grad, x2.grad)
    torch.testing.assert_close(weights.grad, weights2.grad)


def test_bfloat16_base_keeps_gradients_in_float32() -> None:
    torch.manual_seed(0)
    module, precise = Experts(nn.SiLU(), torch.bfloat16), Experts(nn.SiLU())
    precise.load_state_dict(module.state_dict())
    x, index, weights = torch.randn(40, HIDDEN).bfloat16(), routing(40, 2, 2), torch.rand(40, 2).bfloat16()
    grads = []
    for which, dtype in ((module, torch.bfloat16), (precise, torch.float32)):
        owner = adapter(4, 1, dtype)
        which.segments.set({"mlp": [Segment(owner, 0, 40)]})
        y = experts_forward(which, x.to(dtype).requires_grad_(), index, weights.to(dtype))
        assert y.dtype == dtype
        y.float().sum().backward()
        assert owner.grads is not None
        grads.append(owner.grads)
    assert grads[0].dtype == torch.float32
    assert float((grads[0] - grads[1]).norm()) <= 0.03 * float(grads[1].norm())


@given(st.data())
def test_routes_cover_every_pair_once(data: st.DataObject) -> None:
    num_tokens = data.draw(st.integers(1, 12))
    top_k = data.draw(st.integers(1, 3))
    index = torch.tensor(
        data.draw(
            st.lists(
                st.lists(st.integers(0, NUM_EXPERTS - 1), min_size=top_k, max_size=top_k, unique=True),
                min_size=num_tokens,
                max_size=num_tokens,
            )
        )
    )
    edges = sorted(data.draw(st.sets(st.integers(0, num_tokens), max_size=5)))
    owners = [adapter(1, seed) for seed in range(len(edges))]
    parts = [Segment(o, a, b) for o, a, b in zip(owners, edges, edges[1:], strict=False)]
    parts = [part for part in parts if data.draw(st.booleans())]

    found = route(index, parts)
    flat = index.reshape(-1)
    assert torch.equal(found.order[found.inverse], torch.arange(flat.numel()))
    assert torch.equal(found.token, found.order // top_k)
    end = 0
    for (expert, owner), size in zip(found.blocks, found.block_sizes, strict=True):
        start, end = end, end + size
        assert start < end
        for place in range(start, end):
            token = int(found.token[place])
            assert int(flat[found.order[place]]) == expert
            inside = [part.adapter for part in parts if part.start <= token < part.end]
            assert inside == ([] if owner is None else [owner])
    assert end == flat.numel()
    assert found.experts == sorted(set(flat.tolist()))
    assert found.expert_sizes == [int((flat == expert).sum()) for expert in found.experts]
