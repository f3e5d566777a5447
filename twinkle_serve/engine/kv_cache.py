"""The KV cache in fixed blocks: which rows hold a sequence's keys and values, and attention on them.

Blocks are shared by reference count, so the samples of one prompt keep it once. A full block can be kept
under a digest after its last user is gone, until its place is needed. Knows layers, blocks and lengths; does
not know requests, adapters or how tokens are chosen (sampler.py).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F

from twinkle_serve.engine.attention import PackedCausal, window_mask

BLOCK_TOKENS = 16


class OutOfBlocks(Exception):
    """No free block is left; the caller makes room by giving up a sequence."""


@dataclass(slots=True)
class Rows:
    """A sequence's place in the cache: its blocks, and how many of its tokens are cached."""

    blocks: list[int] = field(default_factory=list)
    length: int = 0

    def indices(self, start: int, end: int) -> torch.Tensor:
        """Cache rows of positions ``start:end``, int64."""
        positions = np.arange(start, end)
        blocks = np.asarray(self.blocks, dtype=np.int64)
        return torch.from_numpy(blocks[positions // BLOCK_TOKENS] * BLOCK_TOKENS + positions % BLOCK_TOKENS)


class KVCache:
    """Keys and values of all layers, and who uses which block.

    pages: for each layer ``[rows, 2, kv_heads, head_dim]``, a row's key beside its value, so that both are
    written and read at once. keys, values: views of them.
    """

    def __init__(
        self,
        num_layers: int,
        num_tokens: int,
        kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.num_blocks = max(1, num_tokens // BLOCK_TOKENS)
        shape = (self.num_blocks * BLOCK_TOKENS, 2, kv_heads, head_dim)
        # torch.empty leaves memory untouched on the CPU; blocks are handed out lowest first to keep it so.
        self.pages = [torch.empty(shape, dtype=dtype, device=device) for _ in range(num_layers)]
        self.keys = [pages[:, 0] for pages in self.pages]
        self.values = [pages[:, 1] for pages in self.pages]
        self.device = device
        self._free = list(range(self.num_blocks - 1, -1, -1))
        self._users = [0] * self.num_blocks
        self._kept: dict[bytes, int] = {}
        self._digest_of: dict[int, bytes] = {}
        self._idle: OrderedDict[int, None] = OrderedDict()  # kept blocks without users, least recent first

    @property
    def num_free(self) -> int:
        """Blocks that no sequence uses; some of them may still be kept."""
        return len(self._free) + len(self._idle)

    @property
    def capacity(self) -> int:
        """Tokens that the whole cache holds."""
        return self.num_blocks * BLOCK_TOKENS

    def grow(self, rows: Rows, length: int) -> None:
        """Give ``rows`` blocks for ``length`` tokens. Raises OutOfBlocks and changes nothing."""
        missing = -(-length // BLOCK_TOKENS) - len(rows.blocks)
        if missing > self.num_free:
            raise OutOfBlocks
        for _ in range(missing):
            block = self._take()
            self._users[block] = 1
            rows.blocks.append(block)

    def _take(self) -> int:
        if self._free:
            return self._free.pop()
        block, _ = self._idle.popitem(last=False)
        del self._kept[self._digest_of.pop(block)]
        return block

    def keep(self, block: int, digest: bytes) -> None:
        """Let a full block be found again by ``digest``, which names all tokens up to its end."""
        if digest not in self._kept and block not in self._digest_of:
            self._kept[digest] = block
            self._digest_of[block] = digest

    def share(self, digest: bytes) -> int | None:
        """One more user of the block kept under ``digest``, or None if there is none."""
        block = self._kept.get(digest)
        if block is not None:
            self._idle.pop(block, None)
            self._users[block] += 1
        return block

    def fork(self, rows: Rows) -> Rows:
        """Another sequence that begins like ``rows``: full blocks are shared, the last one is copied.

        Raises OutOfBlocks and changes nothing.
        """
        full = rows.length // BLOCK_TOKENS
        child = Rows(rows.blocks[:full], rows.length)
        self.grow(child, rows.length)
        for block in rows.blocks[:full]:
            self._users[block] += 1
        if full < len(child.blocks):
            source, target = rows.blocks[full] * BLOCK_TOKENS, child.blocks[full] * BLOCK_TOKENS
            used = rows.length - full * BLOCK_TOKENS
            for pages in self.pages:
                pages[target : target + used] = pages[source : source + used]
        return child

    def release(self, rows: Rows) -> None:
        """Give a sequence's blocks back; those that others share stay."""
        # From the end: a kept block is of no use once one before it is gone.
        for block in reversed(rows.blocks):
            self._users[block] -= 1
            if self._users[block] > 0:
                continue
            if block in self._digest_of:
                self._idle[block] = None
            else:
                self._free.append(block)
        rows.blocks, rows.length = [], 0


class _CachedAttend:
    """What both ways to attend share: ``rows`` is theirs, and the modules' interface is made of it."""

    def rows(
        self, layer: int, query: torch.Tensor, kv: torch.Tensor, scale: float | None, window: int | None
    ) -> torch.Tensor:
        raise NotImplementedError

    def __call__(
        self,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scale: float | None,
        window: int | None,
    ) -> torch.Tensor:
        """See attention.Attend."""
        kv = torch.stack([key[0].transpose(0, 1), value[0].transpose(0, 1)], 1)
        out = self.rows(layer, query[0].transpose(0, 1), kv, scale, window)
        return out.view(1, query.shape[2], query.shape[1], query.shape[3])


class PrefillAttend(_CachedAttend):
    """Attention of chunks that lie end to end: each sees its sequence's cached tokens and itself, causally.

    chunks: (rows, first position, number of new tokens). Stores the new keys and values.
    """

    def __init__(self, cache: KVCache, chunks: Sequence[tuple[Rows, int, int]]) -> None:
        self._cache = cache
        self._counts = [count for _, _, count in chunks]
        self._write = torch.cat([rows.indices(start, start + count) for rows, start, count in chunks]).to(
            cache.device
        )
        self._fresh = PackedCausal(self._counts) if all(start == 0 for _, start, _ in chunks) else None
        self._read = [rows.indices(0, start + count).to(cache.device) for rows, start, count in chunks]
        self._masks: dict[int | None, list[torch.Tensor]] = {}

    def rows(
        self, layer: int, query: torch.Tensor, kv: torch.Tensor, scale: float | None, window: int | None
    ) -> torch.Tensor:
        """query [T, Hq, D], kv [T, 2, Hkv, D] -> [T, Hq * D]."""
        pages = self._cache.pages[layer]
        pages.index_copy_(0, self._write, kv)
        heads = query.transpose(0, 1).unsqueeze(0)
        if self._fresh is not None:
            key, value = (part.transpose(0, 1).unsqueeze(0) for part in kv.unbind(1))
            return self._fresh(layer, heads, key, value, scale, window)[0].flatten(1)
        outputs = []
        parts = zip(self._read, heads.split(self._counts, 2), self._masks_of(window), strict=True)
        for read, q, mask in parts:
            k, v = pages.index_select(0, read).permute(1, 2, 0, 3).unsqueeze(1)
            out = F.scaled_dot_product_attention(
                q, k, v, attn_mask=mask, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
            )
            outputs.append(out[0].transpose(0, 1))
        return torch.cat(outputs).flatten(1)

    def _masks_of(self, window: int | None) -> list[torch.Tensor]:
        """Layers of one kind share their masks."""
        if window not in self._masks:
            self._masks[window] = [
                window_mask(count, read.numel(), window, read.device)
                for count, read in zip(self._counts, self._read, strict=True)
            ]
        return self._masks[window]


class DecodeAttend(_CachedAttend):
    """Attention of one new token per sequence to everything cached of it. Stores the new key and value."""

    def __init__(self, cache: KVCache, sequences: Sequence[Rows]) -> None:
        self._cache = cache
        lengths = [rows.length + 1 for rows in sequences]
        self._buckets = [_Bucket(sequences, members, cache.device) for members in _bucket_by_length(lengths)]
        write = [
            rows.blocks[rows.length // BLOCK_TOKENS] * BLOCK_TOKENS + rows.length % BLOCK_TOKENS
            for rows in sequences
        ]
        self._write = torch.tensor(write, device=cache.device)

    def rows(
        self, layer: int, query: torch.Tensor, kv: torch.Tensor, scale: float | None, window: int | None
    ) -> torch.Tensor:
        """query [B, Hq, D], kv [B, 2, Hkv, D] -> [B, Hq * D]."""
        pages = self._cache.pages[layer]
        pages.index_copy_(0, self._write, kv)
        if len(self._buckets) == 1:
            return self._buckets[0].attend(query, pages, scale, window)
        out = query.new_empty(query.shape[0], query.shape[1] * query.shape[2])
        for bucket in self._buckets:
            part = bucket.attend(query.index_select(0, bucket.members), pages, scale, window)
            out.index_copy_(0, bucket.members, part)
        return out


class _Bucket:
    """Sequences of similar length, padded to the longest.

    members: int64 [b], their places in the batch. A row is padded with its own first position, so that nobody
    ever reads what another sequence has stored, masked or not.
    """

    def __init__(self, sequences: Sequence[Rows], members: Sequence[int], device: torch.device) -> None:
        lengths = [sequences[i].length + 1 for i in members]
        self._longest = max(lengths)
        num_blocks = -(-self._longest // BLOCK_TOKENS)
        table = np.zeros((len(members), num_blocks), np.int64)
        for row, i in enumerate(members):
            blocks = sequences[i].blocks[:num_blocks]
            table[row, : len(blocks)] = blocks
        read = (table[:, :, None] * BLOCK_TOKENS + np.arange(BLOCK_TOKENS)).reshape(len(members), -1)
        self._padded = min(lengths) < self._longest
        read = read[:, : self._longest]
        if self._padded:
            inside = np.arange(self._longest) < np.asarray(lengths)[:, None]
            read = np.where(inside, read, read[:, :1])
        self.members = torch.tensor(members, device=device)
        self._read = torch.from_numpy(read.reshape(-1)).to(device)
        self._lengths = lengths
        self._masks: dict[int | None, torch.Tensor | None] = {}

    def attend(
        self, query: torch.Tensor, pages: torch.Tensor, scale: float | None, window: int | None
    ) -> torch.Tensor:
        """query [b, Hq, D] -> [b, Hq * D]."""
        count, kv_heads, dim = query.shape[0], pages.shape[2], pages.shape[3]
        read = pages.index_select(0, self._read).view(count, self._longest, 2, kv_heads, dim)
        k, v = read.permute(2, 0, 3, 1, 4).unbind(0)
        # Query heads that share a key head stand where a sequence's positions would: all see the same.
        q = query.reshape(count, kv_heads, -1, dim)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=self._mask(window, query), scale=scale)
        return out.reshape(count, -1)

    def _mask(self, window: int | None, like: torch.Tensor) -> torch.Tensor | None:
        """0 or -inf [b, 1, 1, longest], shared by the layers of one kind; None where all is allowed."""
        if window is not None and window >= self._longest:
            window = None
        if window not in self._masks:
            self._masks[window] = None
            if self._padded or window is not None:
                position, ends = np.arange(self._longest)[None, :], np.asarray(self._lengths)[:, None]
                hidden = position >= ends
                if window is not None:
                    hidden |= position < ends - window
                mask = torch.from_numpy(np.where(hidden, -np.inf, 0.0)[:, None, None, :])
                self._masks[window] = mask.to(like.device, like.dtype)
        return self._masks[window]


def _bucket_by_length(lengths: Sequence[int]) -> list[list[int]]:
    """Indices grouped so that padding at most doubles the work of a group; ascending within a group."""
    buckets: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda i: lengths[i]):
        if buckets and lengths[index] <= 2 * lengths[buckets[-1][0]]:
            buckets[-1].append(index)
        else:
            buckets.append([index])
    return [sorted(bucket) for bucket in buckets]
