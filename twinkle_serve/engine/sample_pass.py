"""One pass of the sampler over the base model: the straight line if there is one, its modules otherwise.

Knows which rows belong to which adapter. Does not know what a row is for (sampler.py).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from twinkle_serve.engine.adapter_pool import AdapterPool, Block, Pooled
from twinkle_serve.engine.base_model import BaseModel
from twinkle_serve.engine.inference import Inference
from twinkle_serve.engine.kv_cache import DecodeAttend, PrefillAttend
from twinkle_serve.engine.packing import make_segments

Stretch = tuple[Pooled | None, int]
"""An adapter, and how many consecutive rows it has."""


class SamplePass:
    """Rows come sorted by their adapter's place in the pool, those of the base model alone first."""

    def __init__(self, base: BaseModel, pool: AdapterPool) -> None:
        self._base = base
        self._pool = pool
        self._inference = Inference.of(base)
        self._width = base.head.in_features
        self._last: tuple[Sequence[Stretch], list[Block]] = ((), [])

    @property
    def is_straight(self) -> bool:
        return self._inference is not None

    def hidden_states(
        self,
        tokens: Sequence[int],
        positions: Sequence[int],
        attend: PrefillAttend | DecodeAttend,
        stretches: Sequence[Stretch],
    ) -> torch.Tensor:
        """Final hidden states [T, H]."""
        device = self._base.device
        token_ids, position_ids = torch.tensor([tokens, positions], device=device)
        if self._inference is None or self._base.segments.grouped:
            self._base.segments.set(make_segments((p.adapter if p else None, n) for p, n in stretches))
        if self._inference is None:
            return self._base.hidden_states(token_ids, position_ids, attend)
        return self._inference.hidden_states(token_ids, position_ids, attend, self._blocks(stretches))

    def logits(self, hidden: torch.Tensor, stretches: Sequence[Stretch]) -> torch.Tensor:
        """float32 [T, V]: all logits of a few rows."""
        if self._inference is None:
            segments = make_segments((p.adapter if p else None, n) for p, n in stretches)
            return self._base.full_logits(hidden, segments["unembed"])
        return self._inference.logits(hidden, self._blocks(stretches))

    def _blocks(self, stretches: Sequence[Stretch]) -> list[Block]:
        """Neighbours of one adapter joined. A pass asks twice for the same: for its layers and its logits."""
        if stretches is self._last[0]:
            return self._last[1]
        joined: list[Stretch] = []
        for pooled, count in stretches:
            if joined and joined[-1][0] is pooled:
                count += joined.pop()[1]
            joined.append((pooled, count))
        self._last = stretches, self._pool.blocks(joined, self._width)
        return self._last[1]
