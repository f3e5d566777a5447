"""The adapters that samples are drawn with, side by side in one pool, and the low-rank products of a batch.

An adapter of rank r takes r consecutive rank rows of the pool (layout.py), so the factors of neighbours lie
next to each other: one product serves all of them, and a mask keeps each row of the batch to its own adapter.
Knows ranks and rows; does not know where weights come from or when an adapter is needed (sample_adapters.py).
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch

from twinkle_serve.engine.layout import AdapterLayout
from twinkle_serve.engine.slots import Adapter, AdapterState

_MERGE_PRODUCTS = 2**19
"""Adapters share a product as long as it takes no more multiplications than this: then their number of
operators costs more than the columns that the mask throws away."""
_KEPT_VIEWS = 256


class PoolFull(Exception):
    """No room for an adapter of this rank; somebody else's has to go first."""


class Views:
    """The factors of some consecutive rank rows by target: A transposed ``[in, R]``, B ``[R, out]``."""

    def __init__(self, layout: AdapterLayout, compute: torch.Tensor, weights: torch.Tensor) -> None:
        """compute, weights: the rank rows ``[R, row_size]``, in the base model's type and in float32."""
        self._layout = layout
        self._compute = compute
        self._weights = weights
        self._a: dict[int, list[torch.Tensor]] = {}
        self._b: dict[int, list[torch.Tensor]] = {}

    def linear(self, target: int) -> tuple[torch.Tensor, torch.Tensor]:
        return self.a_t(target)[0], self.b(target)[0]

    def head(self, target: int) -> tuple[torch.Tensor, torch.Tensor]:
        """In float32, which the unembedding's products always are."""
        which = self._layout.targets[target]
        return self._layout.a(self._weights, which).t(), self._layout.b_t(self._weights, which)

    def a_t(self, target: int) -> list[torch.Tensor]:
        """A transposed: that of each expert, or the only one."""
        if target not in self._a:
            which = self._layout.targets[target]
            parts = self._layout.a(self._compute, which).split(which.in_features, 1)
            self._a[target] = [part.t() for part in parts]
        return self._a[target]

    def b(self, target: int) -> list[torch.Tensor]:
        """B: that of each expert, or the only one."""
        if target not in self._b:
            which = self._layout.targets[target]
            self._b[target] = list(self._layout.b_t(self._compute, which).split(which.out_features, 1))
        return self._b[target]


@dataclass(eq=False, slots=True)
class Pooled:
    """An adapter in the pool, from rank row ``first`` on. ``adapter`` shows the same weights."""

    adapter: Adapter
    first: int

    @property
    def end(self) -> int:
        return self.first + self.adapter.spec.rank


@dataclass(frozen=True, slots=True)
class Block:
    """Rows ``start:end`` of a batch take their low-rank products from the factors in ``views``.

    foreign: bool [rows, R], the columns that are not the row's own; None where all are. scales: [rows, 1] if
    the rows have different ones, else ``scale`` holds for all.
    """

    start: int
    end: int
    views: Views
    scale: float
    foreign: torch.Tensor | None = None
    scales: torch.Tensor | None = None

    def own(self, hidden: torch.Tensor) -> torch.Tensor:
        """Only the row's own columns of ``hidden`` [rows, R], scaled unless ``scale`` does that. In place.

        Filled and not multiplied by zero: another tenant's product may have overflowed.
        """
        if self.foreign is not None:
            hidden.masked_fill_(self.foreign, 0)
        return hidden if self.scales is None else hidden.mul_(self.scales)  # in float32

    def add(self, out: torch.Tensor, x: torch.Tensor, a_t: torch.Tensor, b: torch.Tensor) -> None:
        """out[start:end] += scale (x A^T) B^T of each row's own adapter."""
        if self.end - self.start < x.shape[0]:
            out, x = out[self.start : self.end], x[self.start : self.end]
        out.addmm_(self.own(torch.mm(x, a_t)), b, alpha=self.scale)


class AdapterPool:
    """``num_rows`` rank rows; float32, and a copy in ``dtype`` for the products if that is another type."""

    def __init__(
        self, layout: AdapterLayout, num_rows: int, device: torch.device, dtype: torch.dtype
    ) -> None:
        self._layout = layout
        self._num_rows = num_rows
        self._device = device
        self._dtype = dtype
        self._placed: list[Pooled] = []  # by first row
        self._views: dict[tuple[int, int], Views] = {}
        if device.type != "cpu":
            _ = self._compute  # now, while there is room: training will fill the device

    @cached_property
    def _weights(self) -> torch.Tensor:
        # On a CPU made when the first adapter comes: memory that nobody samples with is left to others.
        return torch.zeros(self._num_rows, self._layout.row_size, device=self._device)

    @cached_property
    def _compute(self) -> torch.Tensor:
        return self._weights if self._dtype == torch.float32 else self._weights.to(self._dtype)

    @property
    def num_bytes(self) -> int:
        """Of the whole pool, made or not."""
        width = 4 + (0 if self._dtype == torch.float32 else self._dtype.itemsize)
        return self._num_rows * self._layout.row_size * width

    def check(self, state: AdapterState) -> None:
        """Raises ValueError for what may not be put: too large a rank, or weights that no product may touch,
        as a zero in another row's mask does not stop a NaN."""
        if state.spec.rank > self._num_rows:
            raise ValueError(f"the adapter has rank {state.spec.rank}; {self._num_rows} is served")
        if not bool(torch.isfinite(state.weights.to(self._dtype)).all()):
            raise ValueError("these weights are not finite: they have diverged; use an earlier checkpoint")

    def put(self, state: AdapterState) -> Pooled:
        """state: has passed ``check``. Raises PoolFull."""
        first = self.gap(state.spec.rank)
        if first is None:
            raise PoolFull
        rows = slice(first, first + state.spec.rank)
        self._weights[rows].copy_(state.weights)
        if self._compute is not self._weights:
            self._compute[rows].copy_(self._weights[rows])
        pooled = Pooled(
            Adapter(self._layout, state.spec, self._weights[rows], compute=self._compute[rows]), first
        )
        self._placed.append(pooled)
        self._placed.sort(key=lambda other: other.first)
        return pooled

    def remove(self, pooled: Pooled) -> None:
        """Its rows may be written over from now on."""
        self._placed.remove(pooled)

    def gap(self, rank: int, gone: Collection[Pooled] = ()) -> int | None:
        """The first row of an adapter of this rank if those in ``gone`` were not there; None: no room."""
        end = 0
        for pooled in self._placed:
            if pooled in gone:
                continue
            if pooled.first - end >= rank:
                return end
            end = pooled.end
        return end if self._num_rows - end >= rank else None

    def views(self, first: int, end: int) -> Views:
        found = self._views.get((first, end))
        if found is None:
            if len(self._views) >= _KEPT_VIEWS:
                self._views.clear()
            found = Views(self._layout, self._compute[first:end], self._weights[first:end])
            self._views[first, end] = found
        return found

    def blocks(self, rows: Sequence[tuple[Pooled | None, int]], width: int) -> list[Block]:
        """The products of a batch: consecutive (adapter, number of rows), ascending in the pool, those of the
        base model alone first. ``width``: of the base model's hidden states."""
        blocks: list[Block] = []
        members: list[tuple[Pooled, int, int]] = []
        position = 0
        for pooled, count in rows:
            start, position = position, position + count
            if pooled is None:
                assert not members, "rows without an adapter come first"
                continue
            if members:
                columns = pooled.end - members[0][0].first
                if (position - members[0][1]) * columns * width > _MERGE_PRODUCTS:
                    blocks.append(self._block(members))
                    members = []
            members.append((pooled, start, position))
        return [*blocks, self._block(members)] if members else blocks

    def _block(self, members: Sequence[tuple[Pooled, int, int]]) -> Block:
        """members: (adapter, its first row in the batch, the row after its last)."""
        (first, start, _), (last, _, end) = members[0], members[-1]
        views = self.views(first.first, last.end)
        scale = first.adapter.scale
        if first is last:
            return Block(start, end, views, scale)
        counts = [stop - begin for _, begin, stop in members]
        columns = np.arange(first.first, last.end)
        begins = np.repeat([pooled.first for pooled, _, _ in members], counts)[:, None]
        ends = np.repeat([pooled.end for pooled, _, _ in members], counts)[:, None]
        foreign = torch.from_numpy((columns < begins) | (columns >= ends)).to(self._device)
        scales = [pooled.adapter.scale for pooled, _, _ in members]
        if all(other == scale for other in scales):
            return Block(start, end, views, scale, foreign)
        per_row = torch.from_numpy(np.repeat(np.array(scales, np.float32), counts)[:, None])
        return Block(start, end, views, 1.0, foreign, per_row.to(self._device))
