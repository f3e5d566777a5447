"""The KV cache: who holds which block, and attention over it against plain causal attention."""

from __future__ import annotations

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule

from twinkle_serve.engine.kv_cache import (
    BLOCK_TOKENS,
    DecodeAttend,
    KVCache,
    OutOfBlocks,
    PrefillAttend,
    Rows,
)

HEADS, KV_HEADS, DIM, LAYERS = 4, 2, 8, 2


def cache(num_tokens: int = 16 * BLOCK_TOKENS) -> KVCache:
    return KVCache(LAYERS, num_tokens, KV_HEADS, DIM, torch.float32, torch.device("cpu"))


def qkv(rows: int, seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(1, heads, rows, DIM, generator=generator) for heads in (HEADS, KV_HEADS, KV_HEADS))
    return q, k, v


def causal(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, window: int | None) -> torch.Tensor:
    """[1, N, Hq, D]: all of a sequence at once, softmax written out."""
    n = q.shape[2]
    k, v = (t.repeat_interleave(HEADS // KV_HEADS, 1) for t in (k, v))
    scores = q @ k.transpose(2, 3) * 0.3
    rows, columns = torch.arange(n)[:, None], torch.arange(n)[None, :]
    hidden = columns > rows
    if window is not None:
        hidden |= columns <= rows - window
    return (scores.masked_fill(hidden, -torch.inf).softmax(-1) @ v).transpose(1, 2)


def test_blocks_come_lowest_first_and_go_back() -> None:
    kv = cache()
    one, two = Rows(), Rows()
    kv.grow(one, 1)
    kv.grow(two, 2 * BLOCK_TOKENS)
    kv.grow(one, BLOCK_TOKENS)  # fits already
    assert (one.blocks, two.blocks) == ([0], [1, 2])
    kv.grow(one, BLOCK_TOKENS + 1)
    assert one.blocks == [0, 3]
    assert one.indices(BLOCK_TOKENS - 1, BLOCK_TOKENS + 1).tolist() == [BLOCK_TOKENS - 1, 3 * BLOCK_TOKENS]
    kv.release(one)
    kv.release(two)
    assert (one, kv.num_free) == (Rows(), kv.num_blocks)


def test_growing_beyond_the_cache_changes_nothing() -> None:
    kv = cache(3 * BLOCK_TOKENS)
    rows = Rows()
    kv.grow(rows, BLOCK_TOKENS)
    with pytest.raises(OutOfBlocks):
        kv.grow(rows, 4 * BLOCK_TOKENS)
    assert (rows.blocks, kv.num_free, kv.capacity) == ([0], 2, 3 * BLOCK_TOKENS)


def test_a_fork_shares_full_blocks_and_copies_the_last() -> None:
    kv = cache()
    parent = Rows()
    kv.grow(parent, BLOCK_TOKENS + 3)
    parent.length = BLOCK_TOKENS + 3
    for layer in range(LAYERS):
        kv.keys[layer].copy_(torch.randn(kv.keys[layer].shape))
        kv.values[layer].copy_(torch.randn(kv.values[layer].shape))
    child = kv.fork(parent)
    assert child.length == parent.length
    assert child.blocks[0] == parent.blocks[0]
    assert child.blocks[1] != parent.blocks[1]
    for tensor in (*kv.keys, *kv.values):
        own, copied = parent.indices(0, parent.length), child.indices(0, child.length)
        assert torch.equal(tensor[own], tensor[copied])
    kv.release(parent)
    assert kv.num_free == kv.num_blocks - 2
    kv.release(child)
    assert kv.num_free == kv.num_blocks


def test_a_fork_at_a_block_s_end_takes_no_block() -> None:
    kv = cache()
    parent = Rows()
    kv.grow(parent, 2 * BLOCK_TOKENS)
    parent.length = 2 * BLOCK_TOKENS
    free = kv.num_free
    child = kv.fork(parent)
    assert (child.blocks, kv.num_free) == (parent.blocks, free)
    assert child.blocks is not parent.blocks


def test_a_fork_without_room_changes_nothing() -> None:
    kv = cache(2 * BLOCK_TOKENS)
    parent = Rows()
    kv.grow(parent, BLOCK_TOKENS + 1)
    parent.length = BLOCK_TOKENS + 1
    with pytest.raises(OutOfBlocks):
        kv.fork(parent)
    kv.release(parent)
    assert kv.num_free == 2


@pytest.mark.parametrize("window", [None, 5])
def test_prefill_in_chunks_then_decode_is_causal_attention(window: int | None) -> None:
    """Three sequences of different lengths, their prompts cut differently, decoded together."""
    kv = cache()
    lengths = [37, 3, 18]
    prompts = [33, 1, 17]
    data = [qkv(length, seed) for seed, length in enumerate(lengths)]
    sequences = [Rows() for _ in lengths]
    found: list[list[torch.Tensor]] = [[] for _ in lengths]

    def prefill(chunks: list[tuple[int, int]]) -> None:
        """(sequence, number of tokens) each."""
        spans = [(sequences[s], sequences[s].length, n) for s, n in chunks]
        for rows, start, n in spans:
            kv.grow(rows, start + n)
        parts = [[t[:, :, sequences[s].length :][:, :, :n] for t in data[s]] for s, n in chunks]
        q, k, v = (torch.cat([part[i] for part in parts], 2) for i in range(3))
        attend = PrefillAttend(kv, spans)
        for layer in range(LAYERS):
            out = attend(layer, q, k, v, 0.3, window)
        for (s, n), rows in zip(chunks, out.split([n for _, n in chunks], 1), strict=True):
            found[s].append(rows)
            sequences[s].length += n

    prefill([(0, 9), (1, 1)])
    prefill([(2, 16), (0, 20)])
    prefill([(0, 4), (2, 1)])
    assert [rows.length for rows in sequences] == prompts
    for step in range(4):
        active = [s for s in range(3) if prompts[s] + step < lengths[s]]
        for s in active:
            kv.grow(sequences[s], sequences[s].length + 1)
        attend = DecodeAttend(kv, [sequences[s] for s in active])
        position = [sequences[s].length for s in active]
        q, k, v = (
            torch.cat([data[s][i][:, :, p : p + 1] for s, p in zip(active, position, strict=True)], 2)
            for i in range(3)
        )
        for layer in range(LAYERS):
            out = attend(layer, q, k, v, 0.3, window)
        for row, s in enumerate(active):
            found[s].append(out[:, row : row + 1])
            sequences[s].length += 1
    for s in range(3):
        torch.testing.assert_close(torch.cat(found[s], 1), causal(*data[s], window))


def test_a_sequence_of_one_decodes_alone() -> None:
    kv, rows = cache(), Rows()
    kv.grow(rows, 1)
    q, k, v = qkv(1, 0)
    out = DecodeAttend(kv, [rows])(0, q, k, v, 0.3, None)
    torch.testing.assert_close(out, causal(q, k, v, None))


class Blocks(RuleBasedStateMachine):
    """Grow, fork and release at random; a block is never lost, and never two writers' at once."""

    sequences: Bundle[Rows] = Bundle("sequences")

    def __init__(self) -> None:
        super().__init__()
        self.kv = cache(8 * BLOCK_TOKENS)
        self.living: list[Rows] = []

    @rule(target=sequences, length=st.integers(1, 4 * BLOCK_TOKENS))
    def begin(self, length: int) -> Rows:
        rows = Rows()
        self.living.append(rows)
        self._grow(rows, length)
        return rows

    @rule(rows=sequences, more=st.integers(1, 2 * BLOCK_TOKENS))
    def extend(self, rows: Rows, more: int) -> None:
        self._grow(rows, rows.length + more)

    @rule(target=sequences, rows=sequences)
    def fork(self, rows: Rows) -> Rows:
        try:
            child = self.kv.fork(rows)
        except OutOfBlocks:
            child = Rows()
        self.living.append(child)
        return child

    @rule(rows=consumes(sequences))
    def end(self, rows: Rows) -> None:
        self.living = [other for other in self.living if other is not rows]
        self.kv.release(rows)

    def _grow(self, rows: Rows, length: int) -> None:
        free = self.kv.num_free
        try:
            self.kv.grow(rows, length)
            rows.length = length
        except OutOfBlocks:
            assert self.kv.num_free == free

    @invariant()
    def blocks_add_up(self) -> None:
        used = {block for rows in self.living for block in rows.blocks}
        assert len(used) + self.kv.num_free == self.kv.num_blocks

    @invariant()
    def a_block_that_is_still_written_has_one_user(self) -> None:
        for rows in self.living:
            assert len(rows.blocks) == -(-rows.length // BLOCK_TOKENS)
            if rows.length % BLOCK_TOKENS:
                assert sum(rows.blocks[-1] in other.blocks for other in self.living) == 1


TestBlocks = Blocks.TestCase
TestBlocks.settings = settings(max_examples=40, stateful_step_count=25, deadline=None)
