"""Prompt prefixes that are still in the KV cache, found by the tokens that led to them.

Knows digests of tokens and which sequence may share with which: only those of one tenant and one adapter.
Does not know how blocks are counted (kv_cache.py) or scheduled (sampler.py).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from hashlib import blake2b

import numpy as np

from twinkle_serve.engine.kv_cache import BLOCK_TOKENS, KVCache, Rows


def reuse(cache: KVCache, owner: str, tokens: Sequence[int], limit: int) -> Rows:
    """A place that begins with as many kept blocks as hold the first tokens, ``limit`` tokens at most."""
    rows = Rows()
    for digest in _digests(owner, tokens, limit):
        block = cache.share(digest)
        if block is None:
            break
        rows.blocks.append(block)
        rows.length += BLOCK_TOKENS
    return rows


def remember(cache: KVCache, owner: str, tokens: Sequence[int], rows: Rows) -> None:
    """Keep the full blocks of a sequence for whoever of the same ``owner`` begins with the same tokens."""
    for block, digest in zip(rows.blocks, _digests(owner, tokens, rows.length), strict=False):
        cache.keep(block, digest)


def _digests(owner: str, tokens: Sequence[int], limit: int) -> Iterator[bytes]:
    """One digest for each whole block among the first ``limit`` tokens: of all tokens up to its end."""
    digest = blake2b(owner.encode(), digest_size=16).digest()
    for start in range(0, limit - BLOCK_TOKENS + 1, BLOCK_TOKENS):
        block = np.asarray(tokens[start : start + BLOCK_TOKENS], np.int32)
        digest = blake2b(digest + block.tobytes(), digest_size=16).digest()
        yield digest
