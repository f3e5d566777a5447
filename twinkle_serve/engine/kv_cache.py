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
    """Keys and values of all layers, ``[rows, kv_heads, head_dim]`` each, and who uses which block."""

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
        shape = (self.num_blocks * BLOCK_TOKENS, kv_heads, head_dim)
        # torch.empty leaves pages untouched on the CPU; blocks are handed out lowest first to keep it so.
        self.keys = [torch.empty(shape, dtype=dtype, device=device) for _ in range(num_layers)]
        self.values = [torch.empty(shape, dtype=dtype, device=device) for _ in range(num_layers)]
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
            for cache in (*self.keys, *self.values):
                cache[target : target + used] = cache[source : source + used]
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


class PrefillAttend:
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

    def __call__(
        self,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scale: float | None,
        window: int | None,
    ) -> torch.Tensor:
        keys, values = self._cache.keys[layer], self._cache.values[layer]
        keys.index_copy_(0, self._write, key[0].transpose(0, 1))
        values.index_copy_(0, self._write, value[0].transpose(0, 1))
        if self._fresh is not None:
            return self._fresh(layer, query, key, value, scale, window)
        outputs = []
        parts = zip(self._read, query.split(self._counts, 2), self._masks_of(window), strict=True)
        for read, q, mask in parts:
            k, v = (cache.index_select(0, read).transpose(0, 1).unsqueeze(0) for cache in (keys, values))
            out = F.scaled_dot_product_attention(
                q, k, v, attn_mask=mask, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
            )
            outputs.append(out.transpose(1, 2))
        return torch.cat(outputs, 1)

    def _masks_of(self, window: int | None) -> list[torch.Tensor]:
        """Layers of one kind share their masks."""
        if window not in self._masks:
            self._masks[window] = [
                window_mask(count, read.numel(), window, read.device)
                for count, read in zip(self._counts, self._read, strict=True)
            ]
        return self._masks[window]


class DecodeAttend:
    """Attention of one new token per sequence to everything cached of it. Stores the new key and value."""

    def __init__(self, cache: KVCache, sequences: Sequence[Rows]) -> None:
        self._cache = cache
        self._lengths = [rows.length + 1 for rows in sequences]
        self._buckets = [
            _Bucket(sequences, members, cache.device) for members in _bucket_by_length(self._lengths)
        ]
        write = [
            rows.blocks[rows.length // BLOCK_TOKENS] * BLOCK_TOKENS + rows.length % BLOCK_TOKENS
            for rows in sequences
        ]
        self._write = torch.tensor(write).to(cache.device)

    def __call__(
        self,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scale: float | None,
        window: int | None,
    ) -> torch.Tensor:
        keys, values = self._cache.keys[layer], self._cache.values[layer]
        keys.index_copy_(0, self._write, key[0].transpose(0, 1))
        values.index_copy_(0, self._write, value[0].transpose(0, 1))
        rows = query[0].transpose(0, 1)  # [B, Hq, D]
        if len(self._buckets) == 1:
            return self._buckets[0].attend(rows, keys, values, scale, window).unsqueeze(0)
        out = torch.empty_like(rows)
        for bucket in self._buckets:
            part = bucket.attend(rows.index_select(0, bucket.members), keys, values, scale, window)
            out.index_copy_(0, bucket.members, part)
        return out.unsqueeze(0)


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
        positions = np.arange(self._longest)
        inside = positions < np.asarray(lengths)[:, None]
        read = np.where(inside, read[:, : self._longest], read[:, :1])
        self.members = torch.tensor(members).to(device)
        self._read = torch.from_numpy(read.reshape(-1)).to(device)
        self._lengths = torch.tensor(lengths).to(device)
        self._padded = min(lengths) < self._longest
        self._masks: dict[int | None, torch.Tensor | None] = {}

    def attend(
        self,
        query: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        scale: float | None,
        window: int | None,
    ) -> torch.Tensor:
        """query [b, Hq, D] -> [b, Hq, D]."""
        count = query.shape[0]
        k, v = (
            cache.index_select(0, self._read).view(count, self._longest, *cache.shape[1:]).transpose(1, 2)
            for cache in (keys, values)
        )
        out = F.scaled_dot_product_attention(
            query.unsqueeze(2),
            k,
            v,
            attn_mask=self._mask(window),
            scale=scale,
            enable_gqa=query.shape[1] != k.shape[1],
        )
        return out.squeeze(2)

    def _mask(self, window: int | None) -> torch.Tensor | None:
        """bool [b, 1, 1, longest], shared by the layers of one kind; None where everything is allowed."""
        if window is not None and window >= self._longest:
            window = None
        if window not in self._masks:
            position = torch.arange(self._longest, device=self._lengths.device)[None, :]
            allowed = position < self._lengths[:, None]
            if window is not None:
                allowed &= position >= self._lengths[:, None] - window
            self._masks[window] = allowed[:, None, None, :] if self._padded or window is not None else None
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
