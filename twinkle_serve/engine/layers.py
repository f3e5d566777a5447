"""LoRA on linear layers: one base product for the whole packed batch, low-rank products segment by segment.

Backward writes factor gradients straight into the slots' buffers, so accumulation costs nothing and idle
slots are not touched. Knows segments of rows; does not know tenants, losses or fused experts (experts.py).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable

from twinkle_serve.engine.frozen import packed, product, product_back
from twinkle_serve.engine.grouped import GroupedLinear, Stretches
from twinkle_serve.engine.layout import Group
from twinkle_serve.engine.slots import Segment


class Segments:
    """The rows of the batch that is running now, per group of targets; every LoRA layer reads it.

    One instance is shared by all layers of a model. A group that an adapter does not train has no segment of
    that adapter, so it costs and changes nothing.
    """

    def __init__(self, grouped: bool = False) -> None:
        """grouped: use grouped matrix products (grouped.py) instead of one product per segment."""
        self.grouped = grouped
        self._by_group: Mapping[Group, Sequence[Segment]] = {}
        self._stretches: dict[Group, Stretches] = {}

    def set(self, by_group: Mapping[Group, Sequence[Segment]]) -> None:
        self._by_group = by_group
        self._stretches = {}

    def stretches(self, group: Group, rows: torch.Tensor) -> Stretches:
        """The segments of a group as grouped products take them; made once per batch."""
        if group not in self._stretches:
            self._stretches[group] = Stretches.of(self.of(group), rows.shape[0], rows)
        return self._stretches[group]

    def of(self, group: Group) -> Sequence[Segment]:
        return self._by_group.get(group, ())


class LoraLinear(nn.Module):
    """A frozen linear layer plus the low-rank products of whichever adapters own the rows."""

    def __init__(self, base: nn.Linear, segments: Segments, group: Group, target_index: int) -> None:
        super().__init__()
        self.base = base
        self.segments = segments
        self.group = group
        self.target_index = target_index
        self.in_features = base.in_features
        self.out_features = base.out_features

    @property
    def weight(self) -> torch.Tensor:
        return self.base.weight

    @property
    def bias(self) -> torch.Tensor | None:
        return self.base.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        segments = self.segments.of(self.group)
        if not segments and packed(self.base.weight) is None:
            return F.linear(x, self.base.weight, self.base.bias)
        flat = x.reshape(-1, self.in_features)
        if self.segments.grouped and segments:
            groups = self.segments.stretches(self.group, flat)
            y = GroupedLinear.apply(flat, self.base.weight, self.base.bias, groups, self.target_index)
            return y.view(*x.shape[:-1], self.out_features)
        y = _LoraLinear.apply(flat, self.base.weight, self.base.bias, segments, self.target_index)
        return y.view(*x.shape[:-1], self.out_features)


class _LoraLinear(torch.autograd.Function):
    """y[T, out] = x W^T + bias; y[segment] += scale (x A^T) B^T."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        segments: Sequence[Segment],
        target_index: int,
    ) -> torch.Tensor:
        y = product(x, weight, bias)
        hidden = []
        for adapter, start, end in segments:
            factors = adapter.factors(target_index)
            h = x[start:end] @ factors.a_t
            y[start:end].addmm_(h, factors.b_t, alpha=adapter.scale)
            hidden.append(h)
        ctx.save_for_backward(x, weight)
        ctx.hidden, ctx.segments, ctx.target_index = hidden, segments, target_index
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        dx = product_back(dy, weight)
        for (adapter, start, end), h in zip(ctx.segments, ctx.hidden, strict=True):
            factors = adapter.factors(ctx.target_index)
            dy_s = dy[start:end]
            dh = dy_s @ factors.b
            accumulate(factors.grad_b_t, h.t(), dy_s, adapter.scale)
            accumulate(factors.grad_a, dh.t(), x[start:end], adapter.scale)
            dx[start:end].addmm_(dh, factors.a, alpha=adapter.scale)
        return dx, None, None, None, None


def accumulate(grad: torch.Tensor | None, left: torch.Tensor, right: torch.Tensor, scale: float) -> None:
    """grad += scale * left @ right, in the gradient's own precision."""
    assert grad is not None, "backward through a frozen adapter"
    if grad.dtype == left.dtype:
        grad.addmm_(left, right, alpha=scale)
    else:
        grad.add_(left @ right, alpha=scale)
