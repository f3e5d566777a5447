"""The same LoRA products as layers.py and experts.py, as grouped matrix products: for GPUs.

The number of kernels a layer launches does not depend on how many adapters or experts the batch has. Factors
of unequal rank are padded with zeros to the largest. Knows stacked factors and offsets; does not know when it
is used (Segments.grouped) or what a segment is for.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from twinkle_serve.engine.activation import activate, backward_activation
from twinkle_serve.engine.layout import AdapterLayout
from twinkle_serve.engine.slots import Adapter, Factors, Segment

_ALIGNMENT_BYTES = 16
"""What grouped_mm asks of every stride."""
_RANK_STEP = 8

Which = Callable[[Factors], torch.Tensor | None]


def fits(layout: AdapterLayout, dtype: torch.dtype) -> bool:
    """Whether the factors of a layout have the strides that grouped products need. The unembedding's do not
    count: its products are made chunk by chunk (logprobs.py)."""
    step = _ALIGNMENT_BYTES // dtype.itemsize
    targets = [t for t in layout.targets if t.group != "unembed"]
    return all(t.in_features % step == 0 and t.out_features % step == 0 for t in targets)


class Stretches(NamedTuple):
    """All rows of a batch as consecutive groups, those without an adapter included.

    ends: int32 [G] on the device. rank: the rows of every stacked factor.
    """

    adapters: tuple[Adapter | None, ...]
    starts: tuple[int, ...]
    ends: torch.Tensor
    rank: int
    scales: torch.Tensor

    @classmethod
    def of(cls, segments: Sequence[Segment], num_rows: int, device: torch.device) -> Stretches:
        bounds = bounds_of(segments, num_rows)
        adapters, starts = zip(*bounds, strict=True)
        largest = max((adapter.spec.rank for adapter in adapters if adapter is not None), default=1)
        scales = [1.0 if adapter is None else adapter.scale for adapter in adapters]
        return cls(
            adapters,
            starts,
            torch.tensor([*starts[1:], num_rows], dtype=torch.int32, device=device),
            -(-largest // _RANK_STEP) * _RANK_STEP,
            torch.tensor(scales, device=device).view(-1, 1, 1),
        )

    def stack(self, index: int, width: int, which: Which, like: torch.Tensor) -> torch.Tensor:
        """One factor of every group: [G, rank, width], zero where there is none."""
        none = like.new_zeros(self.rank, width)
        rows = [none if a is None else self._padded(which(a.factors(index))) for a in self.adapters]
        return torch.stack(rows)

    def _padded(self, factor: torch.Tensor | None) -> torch.Tensor:
        assert factor is not None
        missing = self.rank - factor.shape[0]
        return F.pad(factor, (0, 0, 0, missing)) if missing else factor

    def accumulate(self, index: int, which: Which, gradients: torch.Tensor) -> None:
        """Add [G, rank, width] to the gradients that ``which`` picks."""
        owned = [(i, adapter) for i, adapter in enumerate(self.adapters) if adapter is not None]
        targets = [which(adapter.factors(index)) for _, adapter in owned]
        assert all(target is not None for target in targets), "backward through a frozen adapter"
        parts = [gradients[i, : adapter.spec.rank].float() for i, adapter in owned]
        if len({id(adapter) for _, adapter in owned}) < len(owned):
            # An adapter comes once for each rank that has rows of it. Additions of one kernel would race.
            for target, part in zip(targets, parts, strict=True):
                assert target is not None
                target.add_(part)
        elif parts:
            torch._foreach_add_([target for target in targets if target is not None], parts)


def bounds_of(segments: Sequence[Segment], num_rows: int) -> list[tuple[Adapter | None, int]]:
    """(adapter, first row) of consecutive stretches that cover all rows, gaps included."""
    bounds: list[tuple[Adapter | None, int]] = []
    position = 0
    for adapter, start, end in segments:
        if start > position:
            bounds.append((None, position))
        bounds.append((adapter, start))
        position = end
    if position < num_rows or not bounds:
        bounds.append((None, position))
    return bounds


def _a(factors: Factors) -> torch.Tensor:
    return factors.a


def _b_t(factors: Factors) -> torch.Tensor:
    return factors.b_t


def _grad_a(factors: Factors) -> torch.Tensor | None:
    return factors.grad_a


def _grad_b_t(factors: Factors) -> torch.Tensor | None:
    return factors.grad_b_t


def _mm(rows: torch.Tensor, stack: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    """rows [N, K] times the matrix of its group in ``stack`` [G, K, M]: [N, M]."""
    return F.grouped_mm(rows, stack, offs=ends)


def _outer(left: torch.Tensor, right: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    """left^T right of each group's rows, [N, K] and [N, M]: [G, K, M]."""
    return F.grouped_mm(left.t(), right, offs=ends)


class GroupedLinear(torch.autograd.Function):
    """layers._LoraLinear: y = x W^T + bias; y[segment] += scale (x A^T) B^T."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        groups: Stretches,
        index: int,
    ) -> torch.Tensor:
        a = groups.stack(index, x.shape[1], _a, x)
        b_t = groups.stack(index, weight.shape[0], _b_t, x) * groups.scales.to(x.dtype)
        hidden = _mm(x, a.transpose(1, 2), groups.ends)
        y = F.linear(x, weight, bias)
        y += _mm(hidden, b_t, groups.ends)
        ctx.save_for_backward(x, weight, hidden, a, b_t)
        ctx.groups, ctx.index = groups, index
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight, hidden, a, b_t = ctx.saved_tensors
        groups, dy = ctx.groups, dy.contiguous()
        dhidden = _mm(dy, b_t.transpose(1, 2), groups.ends)
        groups.accumulate(ctx.index, _grad_b_t, _outer(hidden, dy, groups.ends) * groups.scales)
        groups.accumulate(ctx.index, _grad_a, _outer(dhidden, x, groups.ends))
        return dy @ weight + _mm(dhidden, a, groups.ends), None, None, None, None


class PairGroups(NamedTuple):
    """Routed token-expert pairs, sorted by (expert, stretch).

    token, order, inverse: as experts.Routing. expert_ends: int32 [E]. block_ends: int32 [E * stretches].
    """

    token: torch.Tensor
    order: torch.Tensor
    inverse: torch.Tensor
    expert_ends: torch.Tensor
    block_ends: torch.Tensor


def group_pairs(
    top_k_index: torch.Tensor, num_experts: int, groups: Stretches, *, partial: bool = False
) -> PairGroups:
    """Sort the pairs of ``top_k_index`` [T, K], without waiting for the device.

    partial: leave out pairs of experts from ``num_experts`` on. How many stay has to be waited for, but all
    that follows is smaller by the number of ranks.
    """
    flat = top_k_index.reshape(-1)
    order = torch.argsort(flat, stable=True)
    inverse = torch.empty_like(order)
    inverse[order] = torch.arange(order.numel(), device=order.device)
    if partial:
        order = order[: int((flat < num_experts).sum())]
        inverse.clamp_(max=order.numel())
    token = order // top_k_index.shape[1]
    stretch = torch.searchsorted(groups.ends, token.int(), right=True)
    width = len(groups.adapters)
    counts = torch.zeros(num_experts * width, dtype=torch.int32, device=flat.device)
    counts.scatter_add_(0, flat[order] * width + stretch, torch.ones_like(order, dtype=torch.int32))
    expert_ends = counts.view(num_experts, width).sum(1).cumsum(0).int()
    return PairGroups(token, order, inverse, expert_ends, counts.cumsum(0).int())


def _per_expert(stack: torch.Tensor, num_experts: int) -> torch.Tensor:
    """[G, R, E * I] -> [E * G, R, I], in the order of PairGroups.block_ends."""
    num_groups, rank, width = stack.shape
    split = stack.view(num_groups, rank, num_experts, width // num_experts)
    return split.permute(2, 0, 1, 3).reshape(-1, rank, width // num_experts)


def _all_experts(blocks: torch.Tensor, num_experts: int) -> torch.Tensor:
    """The inverse of _per_expert: [E * G, R, I] -> [G, R, E * I]."""
    _, rank, inner = blocks.shape
    split = blocks.view(num_experts, -1, rank, inner)
    return split.permute(1, 2, 0, 3).reshape(-1, rank, num_experts * inner)


def combine(pairs: torch.Tensor, weights: torch.Tensor, inverse: torch.Tensor) -> torch.Tensor:
    """sum_k w[t, k] pairs[t, k]: [P, D] -> [T, D]."""
    grid = with_blank(pairs, inverse).index_select(0, inverse).view(*weights.shape, pairs.shape[1])
    return torch.bmm(weights.to(pairs.dtype).unsqueeze(1), grid).squeeze(1)


def sum_over_experts(pairs: torch.Tensor, inverse: torch.Tensor, top_k: int) -> torch.Tensor:
    num_tokens, width = inverse.numel() // top_k, pairs.shape[1]  # no -1: the width is 0 without any adapter
    return with_blank(pairs, inverse).index_select(0, inverse).view(num_tokens, top_k, width).sum(1)


def with_blank(pairs: torch.Tensor, inverse: torch.Tensor) -> torch.Tensor:
    """``pairs`` [P, ...], and a row of zeros behind them if some places of ``inverse`` have no pair here."""
    if pairs.shape[0] == inverse.numel():
        return pairs
    return torch.cat((pairs, pairs.new_zeros(1, *pairs.shape[1:])))


class GroupedExperts(torch.autograd.Function):
    """experts._Experts: out[t] = sum_k w[t,k] down_e(act(gate_e(x)) * up_e(x)), each with LoRA on it."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weights: torch.Tensor,
        module: Any,
        groups: Stretches,
        pairs: PairGroups,
        targets: Any,
    ) -> torch.Tensor:
        num_experts, inner = module.gate_up_proj.shape[0], module.gate_up_proj.shape[1] // 2
        gate_up = _mm(x[pairs.token], module.gate_up_proj.transpose(1, 2), pairs.expert_ends)
        scales = groups.scales.to(x.dtype)
        hidden = []
        for half, index in ((slice(0, inner), targets.gate), (slice(inner, None), targets.up)):
            shared = _mm(x, groups.stack(index, x.shape[1], _a, x).transpose(1, 2), groups.ends)
            own = _per_expert(groups.stack(index, num_experts * inner, _b_t, x) * scales, num_experts)
            gate_up[:, half] += _mm(shared[pairs.token], own, pairs.block_ends)
            hidden.append(shared)
        z = activate(module, gate_up)
        out = combine(_mm(z, module.down_proj.transpose(1, 2), pairs.expert_ends), weights, pairs.inverse)
        own = _per_expert(groups.stack(targets.down, num_experts * inner, _a, x), num_experts)
        down = combine(_mm(z, own.transpose(1, 2), pairs.block_ends), weights, pairs.inverse)
        out += _mm(down, groups.stack(targets.down, x.shape[1], _b_t, x) * scales, groups.ends)
        ctx.save_for_backward(x, weights, gate_up, *hidden, down)
        ctx.module, ctx.groups, ctx.pairs, ctx.targets = module, groups, pairs, targets
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weights, gate_up, *_ = ctx.saved_tensors
        module, pairs = ctx.module, ctx.pairs
        z = activate(module, gate_up)
        pair_weights = weights.reshape(-1)[pairs.order].unsqueeze(1).to(z.dtype)
        dz = _backward_down(ctx, z, dout.contiguous(), pair_weights)
        dweights = with_blank((z * dz).sum(1), pairs.inverse)[pairs.inverse].view_as(weights)
        dgate_up = backward_activation(module, gate_up, dz * pair_weights)
        dx = sum_over_experts(
            _mm(dgate_up, module.gate_up_proj, pairs.expert_ends), pairs.inverse, weights.shape[1]
        )
        return _backward_gate_up(ctx, x, dx, dgate_up), dweights, None, None, None, None


def _backward_down(ctx: Any, z: torch.Tensor, dout: torch.Tensor, pair_weights: torch.Tensor) -> torch.Tensor:
    """dz of every pair before its routing weight is applied; adds the gradients of A and B of down."""
    groups, pairs, index = ctx.groups, ctx.pairs, ctx.targets.down
    num_experts, down = ctx.module.down_proj.shape[0], ctx.saved_tensors[5]
    b_t = groups.stack(index, dout.shape[1], _b_t, z) * groups.scales.to(z.dtype)
    dhidden = _mm(dout, b_t.transpose(1, 2), groups.ends)[pairs.token]
    groups.accumulate(index, _grad_b_t, _outer(down, dout, groups.ends) * groups.scales)
    own = _per_expert(groups.stack(index, num_experts * z.shape[1], _a, z), num_experts)
    gradient = _outer(dhidden * pair_weights, z, pairs.block_ends)
    groups.accumulate(index, _grad_a, _all_experts(gradient, num_experts))
    return _mm(dout[pairs.token], ctx.module.down_proj, pairs.expert_ends) + _mm(
        dhidden, own, pairs.block_ends
    )


def _backward_gate_up(ctx: Any, x: torch.Tensor, dx: torch.Tensor, dgate_up: torch.Tensor) -> torch.Tensor:
    """Adds the gradients of A and B of gate and up; returns dx with their part."""
    groups, pairs, targets = ctx.groups, ctx.pairs, ctx.targets
    num_experts, inner = ctx.module.gate_up_proj.shape[0], dgate_up.shape[1] // 2
    top_k, scales = ctx.saved_tensors[1].shape[1], groups.scales.to(x.dtype)
    hidden = ctx.saved_tensors[3:5]
    halves = (slice(0, inner), slice(inner, None))
    for half, index, shared in zip(halves, (targets.gate, targets.up), hidden, strict=True):
        dhalf = dgate_up[:, half].contiguous()
        own = _per_expert(groups.stack(index, num_experts * inner, _b_t, x) * scales, num_experts)
        dhidden = sum_over_experts(_mm(dhalf, own.transpose(1, 2), pairs.block_ends), pairs.inverse, top_k)
        gradient = _all_experts(_outer(shared[pairs.token], dhalf, pairs.block_ends), num_experts)
        groups.accumulate(index, _grad_b_t, gradient * groups.scales)
        groups.accumulate(index, _grad_a, _outer(dhidden, x, groups.ends))
        dx = dx + _mm(dhidden, groups.stack(index, x.shape[1], _a, x), groups.ends)
    return dx
