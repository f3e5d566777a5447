"""Shares of an adapter: every column of the whole is on one rank, or the same on all of them."""

from __future__ import annotations

import pytest
import torch

from twinkle_serve.engine.layout import AdapterLayout, Target
from twinkle_serve.engine.sharding.ranks import Ranks
from twinkle_serve.engine.sharding.shares import Shares, replicated_spans, share_layout
from twinkle_serve.engine.slots import initialize
from twinkle_serve.protocol.data import LoraSpec

WHOLE = AdapterLayout.build(
    [
        Target("linear", "q", "attn", 24, 40),
        Target("expert_gate", "experts", "mlp", 24, 10, 8),
        Target("expert_up", "experts", "mlp", 24, 10, 8),
        Target("expert_down", "experts", "mlp", 10, 24, 8),
        Target("linear", "lm_head", "unembed", 24, 35),
    ]
)


@pytest.mark.parametrize("size", [1, 2, 4, 8])
def test_each_column_is_owned_once_or_replicated(size: int) -> None:
    owners: dict[int, list[int]] = {}
    for rank in range(size):
        shares = Shares(WHOLE, Ranks(rank, size), split_experts=True)
        if size == 1:
            assert shares.layout is WHOLE
            return
        for span in replicated_spans(WHOLE, shares.layout):
            for column in range(span.whole, span.whole + span.width):
                owners.setdefault(column, []).append(-1)
        for span in shares._own_spans(rank):
            for column in range(span.whole, span.whole + span.width):
                owners.setdefault(column, []).append(rank)
    used = {
        column
        for t in WHOLE.targets
        for start, width in ((t.a_offset, t.a_width), (t.b_offset, t.b_width))
        for column in range(start, start + width)
    }
    assert owners.keys() == used
    for found in owners.values():
        assert found == [-1] * size or len(found) == 1


def test_replicated_columns_come_first_and_rows_are_equally_long() -> None:
    shares = [share_layout(WHOLE, rank, 4) for rank in range(4)]
    assert len({(layout.row_size, count) for layout, count in shares}) == 1
    layout, count = shares[1]
    for target in layout.targets:
        assert (target.a_offset < count) == (not target.a_per_expert)
        assert (target.b_offset < count) == (not target.b_per_expert)
    assert [target.first_expert for target in layout.targets] == [0, 2, 2, 2, 0]


@pytest.mark.parametrize("size", [2, 8])
def test_fresh_shares_are_the_parts_of_a_fresh_adapter(size: int) -> None:
    spec = LoraSpec(3, 11)
    whole = torch.zeros(3, WHOLE.row_size)
    initialize(WHOLE, spec, whole)
    for rank in range(size):
        shares = Shares(WHOLE, Ranks(rank, size), split_experts=True)
        share = torch.zeros(3, shares.layout.row_size)
        initialize(shares.layout, spec, share)
        expected = torch.zeros_like(share)
        for span in replicated_spans(WHOLE, shares.layout):
            expected[:, span.own : span.own + span.width] = whole[:, span.whole : span.whole + span.width]
        for span in shares._own_spans(rank):
            place = shares.own(expected)[:, span.own : span.own + span.width]
            place.copy_(whole[:, span.whole : span.whole + span.width])
        assert torch.equal(share, expected)


class Doubling(Ranks):
    """The first of two ranks whose peer always has the same numbers, and zeros of its own."""

    def sum_on_first(self, tensor: torch.Tensor) -> None:
        tensor.mul_(2)

    def receive(self, tensor: torch.Tensor, rank: int) -> torch.Tensor:
        return tensor.zero_()


@pytest.mark.parametrize("rank", [1, 3])
def test_summing_for_a_snapshot_leaves_the_block_as_it_is(rank: int) -> None:
    """A page store hands out what it holds. A single row is contiguous however it is cut."""
    shares = Shares(WHOLE, Doubling(0, 2), split_experts=True)
    block = torch.randn(rank, shares.layout.row_size)
    before = block.clone()
    whole = shares._assemble(block, is_sum=True)
    assert torch.equal(block, before)
    assert torch.equal(whole, shares._assemble(block, is_sum=True))
