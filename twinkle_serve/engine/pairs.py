"""Routed pairs of a token and an expert: their order by expert, and their sums over each token's experts.

Knows routing indices and weights. Does not know what an expert computes, nor adapters beyond where the
stretches of tokens with one of them end.
"""

from __future__ import annotations

from typing import NamedTuple

import torch


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
    top_k_index: torch.Tensor, num_experts: int, ends: torch.Tensor, *, partial: bool = False
) -> PairGroups:
    """Sort the pairs of ``top_k_index`` [T, K], without waiting for the device. ends: int32 [G], where the
    stretches of tokens end.

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
    stretch = torch.searchsorted(ends, token.int(), right=True)
    width = ends.numel()
    counts = torch.zeros(num_experts * width, dtype=torch.int32, device=flat.device)
    counts.scatter_add_(0, flat[order] * width + stretch, torch.ones_like(order, dtype=torch.int32))
    expert_ends = counts.view(num_experts, width).sum(1).cumsum(0).int()
    return PairGroups(token, order, inverse, expert_ends, counts.cumsum(0).int())


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
