"""Which columns of an adapter's block a rank holds, and whole adapters out of the ranks' shares and back.

Experts' own factors live with their experts; all else is replicated. A share's block begins with the
replicated columns, so that they can be summed in one piece. Knows layouts and blocks. Does not know files:
what is saved is always the whole adapter, so it is the same whatever the sharding.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any, NamedTuple

import torch

from twinkle_serve.engine.layout import AdapterLayout, Target, aligned
from twinkle_serve.engine.sharding.ranks import Ranks
from twinkle_serve.engine.slots import AdapterState

_BLOCKS = ("weights", "grads", "exp_avg", "exp_avg_sq")


class Span(NamedTuple):
    """``width`` columns of a whole block from ``whole`` on are columns of a share from ``own`` on."""

    whole: int
    own: int
    width: int


class Shares:
    """How the adapters of one base model lie on the ranks of a group.

    layout: of this rank's blocks. whole: of what is saved. num_replicated: columns of a block that all ranks
    have, at its beginning. Without ``split_experts`` every rank has all columns, in the whole layout's order.
    """

    def __init__(self, whole: AdapterLayout, ranks: Ranks, *, split_experts: bool) -> None:
        self.whole = whole
        self.ranks = ranks
        self.is_split = split_experts and ranks.size > 1
        self.layout, self.num_replicated = whole, whole.row_size
        if self.is_split:
            self.layout, self.num_replicated = share_layout(whole, ranks.rank, ranks.size)

    def replicated(self, block: torch.Tensor) -> torch.Tensor:
        """A view of the columns that all ranks have: their gradients are parts of a sum."""
        return block[..., : self.num_replicated]

    def own(self, block: torch.Tensor) -> torch.Tensor:
        """A view of the columns that only this rank has."""
        return block[..., self.num_replicated :]

    def sum_parts(self, grads: torch.Tensor) -> None:
        """Replace the parts of replicated factors' gradients by their sum, the same bits on every rank."""
        if self.ranks.size == 1:
            return
        common = self.replicated(grads).contiguous()
        self.ranks.sum_(common)
        self.replicated(grads).copy_(common)

    def assemble(self, state: AdapterState) -> AdapterState | None:
        """The whole adapter on the first rank, from every rank's share; None elsewhere.

        Block after block and rank after rank, so that only the first ever holds more than its share.
        Pending gradients of replicated factors are summed. Raises RankLost.
        """
        if self.ranks.size == 1:
            return state
        blocks: dict[str, Any] = {}
        for name in _BLOCKS:
            block: torch.Tensor | None = getattr(state, name)
            if block is not None:
                blocks[name] = self._assemble(block, is_sum=name == "grads")
        return replace(state, **blocks) if self.ranks.is_first else None

    def distribute(self, state: AdapterState | None) -> AdapterState:
        """This rank's share of the first rank's whole adapter: the inverse of ``assemble``."""
        if self.ranks.size == 1:
            assert state is not None
            return state
        nothing: Any = None
        kept = None if state is None else replace(state, **dict.fromkeys(_BLOCKS, nothing))
        names = [] if state is None else [name for name in _BLOCKS if getattr(state, name) is not None]
        kept, names = self.ranks.of_first((kept, names))
        assert kept is not None
        for name in names:
            setattr(kept, name, self._distribute(kept.spec.rank, state, name))
        return kept

    def _assemble(self, block: torch.Tensor, *, is_sum: bool) -> torch.Tensor:
        """A whole block on the first rank, something else elsewhere."""
        common = self.replicated(block)
        if is_sum:
            # A copy in any case: the block may be what a page store holds, and the sum is made in place.
            common = common.clone(memory_format=torch.contiguous_format)
            self.ranks.sum_on_first(common)
        if not self.is_split:
            return common
        if not self.ranks.is_first:
            self.ranks.send(self.own(block), 0)
            return common
        whole = block.new_zeros(block.shape[0], self.whole.row_size)
        for span in replicated_spans(self.whole, self.layout):
            _columns(whole, span.whole, span.width).copy_(_columns(common, span.own, span.width))
        for rank in range(self.ranks.size):
            part = self.own(block)
            if rank > 0:
                part = self.ranks.receive(torch.empty(part.shape), rank)
            for span in self._own_spans(rank):
                _columns(whole, span.whole, span.width).copy_(_columns(part, span.own, span.width))
        return whole

    def _distribute(self, rank: int, state: AdapterState | None, name: str) -> torch.Tensor:
        whole: torch.Tensor | None = None if state is None else getattr(state, name)
        block = torch.zeros(rank, self.layout.row_size)
        common = torch.zeros(rank, self.num_replicated)
        if whole is not None:
            for span in replicated_spans(self.whole, self.layout):
                _columns(common, span.own, span.width).copy_(_columns(whole, span.whole, span.width))
        if name != "grads":  # those of the first rank are the whole sum already
            self.ranks.copy_of_first_(common)
        self.replicated(block).copy_(common)
        if not self.is_split:
            return block
        part = torch.zeros(rank, self.layout.row_size - self.num_replicated)
        if whole is None:
            self.own(block).copy_(self.ranks.receive(part, 0))
            return block
        for other in reversed(range(self.ranks.size)):
            for span in self._own_spans(other):
                _columns(part, span.own, span.width).copy_(_columns(whole, span.whole, span.width))
            if other > 0:
                self.ranks.send(part, other)
        self.own(block).copy_(part)
        return block

    def _own_spans(self, rank: int) -> Iterator[Span]:
        """The columns that only ``rank`` has, counted from where they begin."""
        layout, num_replicated = share_layout(self.whole, rank, self.ranks.size)
        for target, mine in zip(self.whole.targets, layout.targets, strict=True):
            if target.a_per_expert:
                first = mine.first_expert * target.in_features
                yield Span(target.a_offset + first, mine.a_offset - num_replicated, mine.a_width)
            if target.b_per_expert:
                first = mine.first_expert * target.out_features
                yield Span(target.b_offset + first, mine.b_offset - num_replicated, mine.b_width)


def share_layout(whole: AdapterLayout, rank: int, size: int) -> tuple[AdapterLayout, int]:
    """The layout of one rank's share, and how many columns of it are replicated. The same number of columns
    on every rank. The experts of a layer must be divisible by ``size``."""
    targets = [_share(target, rank, size) for target in whole.targets]
    end = 0
    for index, target in enumerate(targets):
        if not target.a_per_expert:
            targets[index], end = replace(target, a_offset=end), aligned(end + target.a_width)
        if not target.b_per_expert:
            targets[index], end = replace(targets[index], b_offset=end), aligned(end + target.b_width)
    num_replicated = end
    for index, target in enumerate(targets):
        if target.a_per_expert:
            targets[index], end = replace(target, a_offset=end), aligned(end + target.a_width)
        if target.b_per_expert:
            targets[index], end = replace(targets[index], b_offset=end), aligned(end + target.b_width)
    return AdapterLayout(tuple(targets), end, whole.family), num_replicated


def replicated_spans(whole: AdapterLayout, share: AdapterLayout) -> Iterator[Span]:
    for target, mine in zip(whole.targets, share.targets, strict=True):
        if not target.a_per_expert or mine.num_experts == target.num_experts:
            yield Span(target.a_offset, mine.a_offset, target.a_width)
        if not target.b_per_expert or mine.num_experts == target.num_experts:
            yield Span(target.b_offset, mine.b_offset, target.b_width)


def _share(target: Target, rank: int, size: int) -> Target:
    if target.num_experts == 0:
        return target
    assert target.num_experts % size == 0
    count = target.num_experts // size
    return replace(target, num_experts=count, first_expert=rank * count, total_experts=target.num_experts)


def _columns(block: torch.Tensor, start: int, width: int) -> torch.Tensor:
    return block[:, start : start + width]
