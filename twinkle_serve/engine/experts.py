"""LoRA on fused MoE experts: grouped products over (expert, segment) blocks of routed token-expert pairs.

Registered with transformers as the experts implementation ``twinkle``, so no model code is changed. The
hidden-side factors are shared by the experts (Tinker's scheme): x A of gate and up is computed once a token,
and the down product is summed over a token's experts in rank space before its shared B is applied. Knows
routing results; does not know the router, tenants or expert parallelism (sharding/).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn
from torch.autograd.function import once_differentiable
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from twinkle_serve.engine.activation import activate, backward_activation
from twinkle_serve.engine.frozen import expert_product, expert_product_back
from twinkle_serve.engine.grouped import GroupedExperts, bounds_of
from twinkle_serve.engine.layers import Segments, accumulate
from twinkle_serve.engine.pairs import combine, group_pairs, sum_over_experts, with_blank
from twinkle_serve.engine.slots import Adapter, Segment

IMPLEMENTATION = "twinkle"


@dataclass(frozen=True, slots=True)
class ExpertTargets:
    """Where an experts module finds its segments and the indices of its three targets in the layout.

    dispatch: takes the place of the experts where they are on several ranks (sharding/); the segments are
    then those of the rows that come to this rank.
    """

    segments: Segments
    gate: int
    up: int
    down: int
    dispatch: Callable[..., torch.Tensor] | None = None


class Routing(NamedTuple):
    """Token-expert pairs sorted by (expert, segment).

    token: int64 [P], the token of each sorted pair. order: the sorted pairs' places in the [T, K] grid, and
    inverse its inverse. experts: those that got pairs, and expert_sizes how many. blocks: finer, the pairs of
    one expert and one adapter (None: base model only), with block_sizes.

    Tensors of pairs are cut by ``split``: slicing them block by block costs more than some of the products.
    """

    token: torch.Tensor
    order: torch.Tensor
    inverse: torch.Tensor
    experts: list[int]
    expert_sizes: list[int]
    blocks: list[tuple[int, Adapter | None]]
    block_sizes: list[int]


def experts_forward(
    module: nn.Module, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """hidden_states [T, H], top_k_index int64 [T, K], top_k_weights [T, K] -> [T, H]."""
    targets: ExpertTargets = module.twinkle_targets  # type: ignore[assignment]
    if targets.dispatch is not None:
        return targets.dispatch(module, hidden_states, top_k_index, top_k_weights)
    return local_experts(module, hidden_states, top_k_index, top_k_weights)


def local_experts(
    module: nn.Module,
    hidden_states: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
    *,
    partial: bool = False,
) -> torch.Tensor:
    """What the experts of ``module`` add to each token; shapes as in ``experts_forward``.

    partial: an index equal to the number of experts stands for one that is elsewhere and adds nothing here.
    """
    targets: ExpertTargets = module.twinkle_targets  # type: ignore[assignment]
    segments = targets.segments.of("mlp")
    num_experts = int(module.num_experts)  # type: ignore[arg-type]
    if targets.segments.grouped:
        groups = targets.segments.stretches("mlp", hidden_states)
        pairs = group_pairs(top_k_index, num_experts, groups.ends, partial=partial)
        return GroupedExperts.apply(hidden_states, top_k_weights, module, groups, pairs, targets)
    routing = route(top_k_index, segments, num_experts if partial else None)
    return _Experts.apply(hidden_states, top_k_weights, module, routing, segments, targets)


ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, experts_forward)


def route(top_k_index: torch.Tensor, segments: Sequence[Segment], num_experts: int | None = None) -> Routing:
    """Sort the pairs of ``top_k_index`` [T, K] by expert, and within an expert by segment.

    Segments are ascending and disjoint, so a stable sort by expert leaves an expert's pairs in segment order.
    num_experts: pairs of experts from this one on are left out; see grouped.with_blank.
    """
    num_tokens, top_k = top_k_index.shape
    # In numpy: for the few pairs of a decode step, launching torch operators would cost more than sorting.
    flat = top_k_index.reshape(-1).cpu().numpy()
    order = np.argsort(flat, kind="stable")
    inverse = np.empty_like(order)
    inverse[order] = np.arange(order.size)
    if num_experts is not None:
        order = order[: np.count_nonzero(flat < num_experts)]
        inverse = np.minimum(inverse, order.size)
    token = order // top_k
    bounds = bounds_of(segments, num_tokens)
    edges = [start for _, start in bounds]
    keys = flat[order] * len(bounds) + np.searchsorted(edges, token, side="right") - 1
    found, counts = np.unique(keys, return_counts=True)
    experts: list[int] = []
    expert_sizes: list[int] = []
    blocks: list[tuple[int, Adapter | None]] = []
    block_sizes = counts.tolist()
    for key, count in zip(found.tolist(), block_sizes, strict=True):
        expert, bound = divmod(key, len(bounds))
        blocks.append((expert, bounds[bound][0]))
        if experts and experts[-1] == expert:
            expert_sizes[-1] += count
        else:
            experts.append(expert)
            expert_sizes.append(count)
    device = top_k_index.device
    return Routing(
        torch.from_numpy(token).to(device),
        torch.from_numpy(order).to(device),
        torch.from_numpy(inverse).to(device),
        experts,
        expert_sizes,
        blocks,
        block_sizes,
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
        out = combine(_base_product(z, module.down_proj, routing), weights, routing.inverse)
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
        dweights = with_blank((z * dz_unweighted).sum(1), routing.inverse)[routing.inverse].view_as(weights)
        dgate_up = backward_activation(module, gate_up, dz_unweighted.mul_(pair_weights))
        dx = sum_over_experts(
            _base_product_back(dgate_up, module.gate_up_proj, routing), routing.inverse, ctx.top_k
        )
        _backward_gate_up(ctx, x, dx, dgate_up, hidden_gate, hidden_up, targets)
        return dx, dweights, None, None, None, None


def _base_product(pairs: torch.Tensor, weights: torch.Tensor, routing: Routing) -> torch.Tensor:
    """Every sorted pair [P, in] times its expert's matrix in ``weights`` [E, out, in]: [P, out]."""
    out = pairs.new_empty(pairs.shape[0], weights.shape[1])
    sizes = routing.expert_sizes
    for expert, rows, into in zip(routing.experts, pairs.split(sizes), out.split(sizes), strict=True):
        expert_product(rows, weights, expert, into)
    return out


def _base_product_back(pairs: torch.Tensor, weights: torch.Tensor, routing: Routing) -> torch.Tensor:
    """The same the other way: [P, out] -> [P, in]."""
    out = pairs.new_empty(pairs.shape[0], weights.shape[2])
    sizes = routing.expert_sizes
    for expert, rows, into in zip(routing.experts, pairs.split(sizes), out.split(sizes), strict=True):
        expert_product_back(rows, weights, expert, into)
    return out


def _columns(pairs: torch.Tensor, adapter: Adapter) -> torch.Tensor:
    """The columns of a block in rank space that the adapter has."""
    rank = adapter.spec.rank
    return pairs if pairs.shape[1] == rank else pairs[:, :rank]


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
    gate_up = _base_product(x.index_select(0, routing.token), projection, routing)
    if hidden_gate.shape[1] == 0:
        return gate_up
    inner = projection.shape[1] // 2
    halves = ((gate_up[:, :inner], hidden_gate, targets.gate), (gate_up[:, inner:], hidden_up, targets.up))
    for half, hidden, index in halves:
        pairs = hidden.index_select(0, routing.token).split(routing.block_sizes)
        for block, into, rows in zip(routing.blocks, half.split(routing.block_sizes), pairs, strict=True):
            expert, adapter = block
            if adapter is not None:
                b_t = adapter.expert_factors(index, expert).b_t
                into.addmm_(_columns(rows, adapter), b_t, alpha=adapter.scale)
    return gate_up


def _down_hidden(
    z: torch.Tensor, weights: torch.Tensor, routing: Routing, targets: ExpertTargets, max_rank: int
) -> torch.Tensor:
    """The down product in rank space, summed over a token's experts with their weights: [T, max rank]."""
    if max_rank == 0:
        return z.new_empty(weights.shape[0], 0)
    pairs = z.new_zeros(z.shape[0], max_rank)
    sizes = routing.block_sizes
    for block, rows, into in zip(routing.blocks, z.split(sizes), pairs.split(sizes), strict=True):
        expert, adapter = block
        if adapter is not None:
            a_t = adapter.expert_factors(targets.down, expert).a_t
            torch.mm(rows, a_t, out=_columns(into, adapter))
    return combine(pairs, weights, routing.inverse)


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
    dhidden_pairs = dhidden.index_select(0, routing.token)
    pair_weights = weights.reshape(-1)[routing.order].unsqueeze(1).to(z.dtype)
    dz = _base_product_back(dout.index_select(0, routing.token), ctx.module.down_proj, routing)
    sizes = routing.block_sizes
    weighted = (dhidden_pairs * pair_weights).split(sizes)
    parts = zip(
        routing.blocks, dz.split(sizes), z.split(sizes), dhidden_pairs.split(sizes), weighted, strict=True
    )
    for (expert, adapter), into, rows, dh, dh_weighted in parts:
        if adapter is not None:
            factors = adapter.expert_factors(targets.down, expert)
            into.addmm_(_columns(dh, adapter), factors.a)
            accumulate(factors.grad_a, _columns(dh_weighted, adapter).t(), rows, 1.0)
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
    routing, sizes = ctx.routing, ctx.routing.block_sizes
    inner = dgate_up.shape[1] // 2
    halves = ((dgate_up[:, :inner], hidden_gate, targets.gate), (dgate_up[:, inner:], hidden_up, targets.up))
    for dhalf, hidden, index in halves:
        hidden_pairs = hidden.index_select(0, routing.token)
        dhidden_pairs = torch.zeros_like(hidden_pairs)
        parts = (dhalf.split(sizes), hidden_pairs.split(sizes), dhidden_pairs.split(sizes))
        for (expert, adapter), dblock, rows, into in zip(routing.blocks, *parts, strict=True):
            if adapter is not None:
                factors = adapter.expert_factors(index, expert)
                torch.mm(dblock, factors.b, out=_columns(into, adapter))
                accumulate(factors.grad_b_t, _columns(rows, adapter).t(), dblock, adapter.scale)
        dhidden = sum_over_experts(dhidden_pairs, routing.inverse, ctx.top_k)
        for adapter, start, end in ctx.segments:
            factors = adapter.factors(index)
            dh = dhidden[start:end, : adapter.spec.rank]
            accumulate(factors.grad_a, dh.t(), x[start:end], adapter.scale)
            dx[start:end].addmm_(dh, factors.a, alpha=adapter.scale)
