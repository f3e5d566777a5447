"""LoRA on fused MoE experts: grouped products over (expert, segment) blocks of routed token-expert pairs.

Registered with transformers as the experts implementation ``twinkle``, so no model code is changed. The
hidden-side factors are shared by the experts (Tinker's scheme): x A of gate and up is computed once a token,
and the down product is summed over a token's experts in rank space before its shared B is applied. Knows
routing results; does not know the router, tenants or expert parallelism (sharding/).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn
from torch.autograd.function import once_differentiable
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from twinkle_serve.engine.activation import activate, backward_activation
from twinkle_serve.engine.grouped import GroupedExperts, bounds_of, group_pairs
from twinkle_serve.engine.layers import Segments, accumulate
from twinkle_serve.engine.slots import Adapter, Segment

IMPLEMENTATION = "twinkle"


@dataclass(frozen=True, slots=True)
class ExpertTargets:
    """Where an experts module finds its segments and the indices of its three targets in the layout."""

    segments: Segments
    gate: int
    up: int
    down: int


class Block(NamedTuple):
    """Sorted pairs ``start:end`` go to ``expert`` and belong to ``adapter`` (None: base model only)."""

    expert: int
    adapter: Adapter | None
    start: int
    end: int


class Routing(NamedTuple):
    """Token-expert pairs sorted by (expert, segment).

    token: int64 [P], the token of each sorted pair. order: the sorted pairs' places in the [T, K] grid, and
    inverse its inverse. expert_ranges: (expert, start, end) of experts that got pairs. blocks: finer, the
    pairs of one expert and one adapter.
    """

    token: torch.Tensor
    order: torch.Tensor
    inverse: torch.Tensor
    expert_ranges: list[tuple[int, int, int]]
    blocks: list[Block]


def experts_forward(
    module: nn.Module, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """hidden_states [T, H], top_k_index int64 [T, K], top_k_weights [T, K] -> [T, H]."""
    targets: ExpertTargets = module.twinkle_targets  # type: ignore[assignment]
    segments = targets.segments.of("mlp")
    if targets.segments.grouped:
        groups = targets.segments.stretches("mlp", hidden_states)
        pairs = group_pairs(top_k_index, int(module.num_experts), groups)  # type: ignore[arg-type]
        return GroupedExperts.apply(hidden_states, top_k_weights, module, groups, pairs, targets)
    routing = route(top_k_index, int(module.num_experts), segments)  # type: ignore[arg-type]
    return _Experts.apply(hidden_states, top_k_weights, module, routing, segments, targets)


ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, experts_forward)


def route(top_k_index: torch.Tensor, num_experts: int, segments: Sequence[Segment]) -> Routing:
    """Sort the pairs of ``top_k_index`` [T, K] by expert, and within an expert by segment.

    Segments are ascending and disjoint, so a stable sort by expert leaves an expert's pairs in segment order.
    """
    num_tokens, top_k = top_k_index.shape
    # In numpy: for the few pairs of a decode step, launching torch operators would cost more than sorting.
    flat = top_k_index.reshape(-1).cpu().numpy()
    order = np.argsort(flat, kind="stable")
    token = order // top_k
    inverse = np.empty_like(order)
    inverse[order] = np.arange(order.size)
    bounds = bounds_of(segments, num_tokens)
    edges = [start for _, start in bounds]
    keys = flat[order] * len(bounds) + np.searchsorted(edges, token, side="right") - 1
    found, counts = np.unique(keys, return_counts=True)
    ranges: list[tuple[int, int, int]] = []
    blocks, position = [], 0
    for key, count in zip(found.tolist(), counts.tolist(), strict=True):
        expert, bound = divmod(key, len(bounds))
        end = position + count
        blocks.append(Block(expert, bounds[bound][0], position, end))
        if ranges and ranges[-1][0] == expert:
            ranges[-1] = (expert, ranges[-1][1], end)
        else:
            ranges.append((expert, position, end))
        position = end
    device = top_k_index.device
    return Routing(
        torch.from_numpy(token).to(device),
        torch.from_numpy(order).to(device),
        torch.from_numpy(inverse).to(device),
        ranges,
        blocks,
    )


class _Experts(torch.autograd.Function):
    """out[t] = sum_k w[t,k] down_e(act(gate_e(x)) * up_e(x)), each projection with its LoRA product."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weights: torch.Tensor,
        module: Any,
        routing: Routing,
        segments: Sequence[Segment],
        targets: ExpertTargets,
    ) -> torch.Tensor:
        top_k = weights.shape[1]
        hidden_gate, hidden_up = _shared_hidden(x, segments, targets)
        gate_up = _gate_up(x, hidden_gate, hidden_up, module.gate_up_proj, routing, targets)
        z = activate(module, gate_up)
        y = x.new_empty(z.shape[0], x.shape[1])
        for expert, start, end in routing.expert_ranges:
            torch.mm(z[start:end], module.down_proj[expert].t(), out=y[start:end])
        out = _combine(y, weights, routing)
        down_hidden = _down_hidden(z, weights, routing, targets, _max_rank(segments))
        for adapter, start, end in segments:
            b_t = adapter.factors(targets.down).b_t
            out[start:end].addmm_(down_hidden[start:end, : adapter.spec.rank], b_t, alpha=adapter.scale)
        ctx.save_for_backward(x, weights, gate_up, hidden_gate, hidden_up, down_hidden)
        ctx.module, ctx.routing, ctx.segments, ctx.targets, ctx.top_k = (
            module,
            routing,
            segments,
            targets,
            top_k,
        )
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weights, gate_up, hidden_gate, hidden_up, down_hidden = ctx.saved_tensors
        routing, targets, module = ctx.routing, ctx.targets, ctx.module
        dout = dout.contiguous()
        z = activate(module, gate_up)
        dz_unweighted = _backward_down(ctx, z, dout, weights, down_hidden)
        pair_weights = weights.reshape(-1)[routing.order].unsqueeze(1)
        dweights = (z * dz_unweighted).sum(1)[routing.inverse].view_as(weights)
        dgate_up = backward_activation(module, gate_up, dz_unweighted.mul_(pair_weights))
        dx_pairs = x.new_empty(gate_up.shape[0], x.shape[1])
        for expert, start, end in routing.expert_ranges:
            torch.mm(dgate_up[start:end], module.gate_up_proj[expert], out=dx_pairs[start:end])
        dx = _sum_over_experts(dx_pairs, routing, ctx.top_k)
        _backward_gate_up(ctx, x, dx, dgate_up, hidden_gate, hidden_up, targets)
        return dx, dweights, None, None, None, None


def _max_rank(segments: Sequence[Segment]) -> int:
    return max((segment.adapter.spec.rank for segment in segments), default=0)


def _shared_hidden(
    x: torch.Tensor, segments: Sequence[Segment], targets: ExpertTargets
) -> tuple[torch.Tensor, torch.Tensor]:
    """x A^T of gate and of up, [T, max rank] each, zero outside a segment's rank."""
    shape = (x.shape[0], _max_rank(segments))
    gate, up = x.new_zeros(shape), x.new_zeros(shape)
    for adapter, start, end in segments:
        rank = adapter.spec.rank
        for out, index in ((gate, targets.gate), (up, targets.up)):
            torch.mm(x[start:end], adapter.factors(index).a_t, out=out[start:end, :rank])
    return gate, up


def _gate_up(
    x: torch.Tensor,
    hidden_gate: torch.Tensor,
    hidden_up: torch.Tensor,
    projection: torch.Tensor,
    routing: Routing,
    targets: ExpertTargets,
) -> torch.Tensor:
    """Gate and up of every sorted pair, side by side: [P, 2I]."""
    x_pairs = x.index_select(0, routing.token)
    inner = projection.shape[1] // 2
    gate_up = x.new_empty(x_pairs.shape[0], 2 * inner)
    for expert, start, end in routing.expert_ranges:
        torch.mm(x_pairs[start:end], projection[expert].t(), out=gate_up[start:end])
    if hidden_gate.shape[1] == 0:
        return gate_up
    gate_pairs = hidden_gate.index_select(0, routing.token)
    up_pairs = hidden_up.index_select(0, routing.token)
    gate_half, up_half = gate_up[:, :inner], gate_up[:, inner:]
    for expert, adapter, start, end in routing.blocks:
        if adapter is None:
            continue
        rank = adapter.spec.rank
        for half, hidden, index in ((gate_half, gate_pairs, targets.gate), (up_half, up_pairs, targets.up)):
            b_t = adapter.expert_factors(index, expert).b_t
            half[start:end].addmm_(hidden[start:end, :rank], b_t, alpha=adapter.scale)
    return gate_up


def _down_hidden(
    z: torch.Tensor, weights: torch.Tensor, routing: Routing, targets: ExpertTargets, max_rank: int
) -> torch.Tensor:
    """The down product in rank space, summed over a token's experts with their weights: [T, max rank]."""
    if max_rank == 0:
        return z.new_empty(weights.shape[0], 0)
    pairs = z.new_zeros(z.shape[0], max_rank)
    for expert, adapter, start, end in routing.blocks:
        if adapter is not None:
            a_t = adapter.expert_factors(targets.down, expert).a_t
            torch.mm(z[start:end], a_t, out=pairs[start:end, : adapter.spec.rank])
    return _combine(pairs, weights, routing)


def _combine(pairs: torch.Tensor, weights: torch.Tensor, routing: Routing) -> torch.Tensor:
    """sum_k w[t, k] pairs[t, k]: [P, D] -> [T, D]."""
    num_tokens, top_k = weights.shape
    grid = pairs.index_select(0, routing.inverse).view(num_tokens, top_k, pairs.shape[1])
    return torch.bmm(weights.to(pairs.dtype).unsqueeze(1), grid).squeeze(1)


def _sum_over_experts(pairs: torch.Tensor, routing: Routing, top_k: int) -> torch.Tensor:
    num_tokens, width = pairs.shape[0] // top_k, pairs.shape[1]  # no -1: the width is 0 without any adapter
    return pairs.index_select(0, routing.inverse).view(num_tokens, top_k, width).sum(1)


def _backward_down(
    ctx: Any, z: torch.Tensor, dout: torch.Tensor, weights: torch.Tensor, down_hidden: torch.Tensor
) -> torch.Tensor:
    """dz of every pair before its routing weight is applied, [P, I]; adds the gradients of A and B of down.

    <z, dz_unweighted> is also the gradient of the routing weight, so the expert outputs are never kept.
    """
    routing, segments, targets = ctx.routing, ctx.segments, ctx.targets
    dhidden = z.new_zeros(dout.shape[0], down_hidden.shape[1])
    for adapter, start, end in segments:
        factors = adapter.factors(targets.down)
        rank = adapter.spec.rank
        torch.mul(dout[start:end] @ factors.b, adapter.scale, out=dhidden[start:end, :rank])
        accumulate(factors.grad_b_t, down_hidden[start:end, :rank].t(), dout[start:end], adapter.scale)
    dout_pairs = dout.index_select(0, routing.token)
    dhidden_pairs = dhidden.index_select(0, routing.token)
    pair_weights = weights.reshape(-1)[routing.order].unsqueeze(1).to(z.dtype)
    dz = torch.empty_like(z)
    for expert, start, end in routing.expert_ranges:
        torch.mm(dout_pairs[start:end], ctx.module.down_proj[expert], out=dz[start:end])
    for expert, adapter, start, end in routing.blocks:
        if adapter is None:
            continue
        factors = adapter.expert_factors(targets.down, expert)
        dh = dhidden_pairs[start:end, : adapter.spec.rank]
        dz[start:end].addmm_(dh, factors.a)
        accumulate(factors.grad_a, (dh * pair_weights[start:end]).t(), z[start:end], 1.0)
    return dz


def _backward_gate_up(
    ctx: Any,
    x: torch.Tensor,
    dx: torch.Tensor,
    dgate_up: torch.Tensor,
    hidden_gate: torch.Tensor,
    hidden_up: torch.Tensor,
    targets: ExpertTargets,
) -> None:
    """Gradients of A and B of gate and up, and their part of dx, added in place."""
    routing = ctx.routing
    inner = dgate_up.shape[1] // 2
    for half, hidden, index in ((0, hidden_gate, targets.gate), (1, hidden_up, targets.up)):
        hidden_pairs = hidden.index_select(0, routing.token)
        dhidden_pairs = torch.zeros_like(hidden_pairs)
        dhalf = dgate_up[:, half * inner : (half + 1) * inner]
        for expert, adapter, start, end in routing.blocks:
            if adapter is None:
                continue
            factors = adapter.expert_factors(index, expert)
            rank, dblock = adapter.spec.rank, dhalf[start:end]
            torch.mm(dblock, factors.b, out=dhidden_pairs[start:end, :rank])
            accumulate(factors.grad_b_t, hidden_pairs[start:end, :rank].t(), dblock, adapter.scale)
        dhidden = _sum_over_experts(dhidden_pairs, routing, ctx.top_k)
        for adapter, start, end in ctx.segments:
            factors = adapter.factors(index)
            dh = dhidden[start:end, : adapter.spec.rank]
            accumulate(factors.grad_a, dh.t(), x[start:end], adapter.scale)
            dx[start:end].addmm_(dh, factors.a, alpha=adapter.scale)
