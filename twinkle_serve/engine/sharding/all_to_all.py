"""Experts on other ranks, reached by sending each row only to the ranks that have one of its experts.

Less is moved than by gathering all rows (dispatch.py) where there are more ranks than experts a token, at the
price of a message about counts before each layer, which every rank has to wait for. A rank that fails in the
middle of a pass takes its group with it: what its peers expect from it depends on its data.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable

from twinkle_serve.engine.experts import local_experts
from twinkle_serve.engine.layers import Segments
from twinkle_serve.engine.packing import make_segments
from twinkle_serve.engine.sharding.dispatch import local_index
from twinkle_serve.engine.sharding.ranks import RankLost, Ranks
from twinkle_serve.engine.sharding.strategy import Stretches


@dataclass(frozen=True, slots=True)
class _Route:
    """Rows that this rank sends, by where they go, and how many of each rank's come here.

    rows: int64, this rank's rows that go to rank 0, then to rank 1, ... sent, received: rows for and from
    each rank. by_stretch: for each rank, how many of its rows that come here are in each of its stretches.
    """

    rows: torch.Tensor
    sent: list[int]
    received: list[int]
    by_stretch: list[list[int]]


class AllToAllDispatch:
    """See dispatch.ExpertDispatch. segments: the rows that have come to this rank for the layer that runs."""

    def __init__(self, ranks: Ranks, device: torch.device) -> None:
        self.ranks = ranks
        self.segments = Segments()
        self._device = device
        self._by_rank: Sequence[Stretches] = ()
        self._stretch_of_row = torch.empty(0, dtype=torch.int64)

    def enter(self, by_rank: Sequence[Stretches]) -> None:
        """Say what rows each rank has in the pass that begins."""
        self._by_rank = by_rank
        counts = torch.tensor([rows for _, rows in by_rank[self.ranks.rank]])
        self._stretch_of_row = torch.arange(len(counts)).repeat_interleave(counts).to(self._device)

    def enter_backward(self) -> None:
        pass

    def rehearsed(self) -> None:
        pass

    def complete(self) -> None:
        raise RankLost("a rank failed in the middle of a pass, and with all_to_all its peers cannot go on")

    def __call__(
        self, module: nn.Module, hidden: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """As experts.experts_forward, on this rank's rows [T, H]."""
        num_experts: int = module.num_experts  # type: ignore[assignment]
        route = self._route(top_k_index, num_experts)
        rows, weights = (
            _Swap.apply(part.index_select(0, route.rows), route.sent, route.received, self.ranks)
            for part in (hidden, top_k_weights)
        )
        index = self.ranks.swap_rows(top_k_index.index_select(0, route.rows), route.sent, route.received)
        stretches = [
            (adapter, count)
            for of_rank, counts in zip(self._by_rank, route.by_stretch, strict=True)
            for (adapter, _), count in zip(of_rank, counts, strict=False)
            if count
        ]
        self.segments.set(make_segments(stretches))
        out = local_experts(module, rows, local_index(index, self.ranks.rank, module), weights, partial=True)
        parts = _Swap.apply(out, route.received, route.sent, self.ranks).split(route.sent)
        total = torch.zeros_like(hidden)
        for place, part in zip(route.rows.split(route.sent), parts, strict=True):
            total = total.index_add(0, place, part)  # each row once: the order of additions is fixed
        return total

    def _route(self, top_k_index: torch.Tensor, num_experts: int) -> _Route:
        owner = top_k_index // num_experts
        goes = torch.stack([(owner == rank).any(1) for rank in range(self.ranks.size)])
        rank, row = goes.nonzero().unbind(1)
        width = max(len(stretches) for stretches in self._by_rank)
        counts = torch.zeros(self.ranks.size, width, dtype=torch.int64, device=self._device)
        counts.index_put_((rank, self._stretch_of_row[row]), torch.ones_like(row), accumulate=True)
        everyones = self.ranks.gather_rows(counts).view(self.ranks.size, self.ranks.size, width)
        here = everyones[:, self.ranks.rank]
        return _Route(row, counts.sum(1).tolist(), here.sum(1).tolist(), here.tolist())


class _Swap(torch.autograd.Function):
    """Ranks.swap_rows; gradients go back the way the rows came."""

    @staticmethod
    def forward(
        ctx: Any, rows: torch.Tensor, sent: list[int], received: list[int], ranks: Ranks
    ) -> torch.Tensor:
        ctx.sent, ctx.received, ctx.ranks = sent, received, ranks
        return ranks.swap_rows(rows, sent, received)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, drows: torch.Tensor) -> tuple[Any, ...]:
        return ctx.ranks.swap_rows(drows, ctx.received, ctx.sent), None, None, None
