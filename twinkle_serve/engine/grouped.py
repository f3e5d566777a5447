"""The same LoRA products as layers.py and experts.py, as grouped matrix products: for GPUs.

The number of kernels a layer launches does not depend on how many adapters or experts the batch has. Factors
of unequal rank are padded with zeros to the largest. Knows stacked factors and offsets; does not know when it
is used (Segments.grouped) or what a segment is for.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from twinkle_serve.engine.activation import activate, backward_activation
from twinkle_serve.engine.layout import AdapterLayout
from twinkle_serve.engine.pairs import PairGroups, combine, sum_over_experts, with_blank
from twinkle_serve.engine.slots import Adapter, Segment

_ALIGNMENT_BYTES = 16
"""What grouped_mm asks of every stride."""
_RANK_STEP = 8

Side = Literal["a", "b_t"]
"""Which factor of a target."""


def fits(layout: AdapterLayout, dtype: torch.dtype) -> bool:
    """Whether the factors of a layout have the strides that grouped products need. The unembedding's do not
    count: its products are made chunk by chunk (logprobs.py)."""
    step = _ALIGNMENT_BYTES // dtype.itemsize
    targets = [t for t in layout.targets if t.group != "unembed"]
    return all(t.in_features % step == 0 and t.out_features % step == 0 for t in targets)


@dataclass(frozen=True, slots=True)
class Stretches:
    """All rows of a batch as consecutive groups, those without an adapter included.

    ends: int32 [G] on the device. rank: the rows of every stacked factor. row_scales: float32 [N, 1], of each
    row's adapter. homes: the groups' slots if all adapters are in one pool.
    """

    adapters: tuple[Adapter | None, ...]
    starts: tuple[int, ...]
    ends: torch.Tensor
    rank: int
    row_scales: torch.Tensor
    homes: _Homes | None

    @classmethod
    def of(cls, segments: Sequence[Segment], num_rows: int, like: torch.Tensor) -> Stretches:
        bounds = bounds_of(segments, num_rows)
        adapters, starts = zip(*bounds, strict=True)
        ends = [*starts[1:], num_rows]
        largest = max((adapter.spec.rank for adapter in adapters if adapter is not None), default=1)
        rank = -(-largest // _RANK_STEP) * _RANK_STEP
        scales = [0.0 if adapter is None else adapter.scale for adapter in adapters]
        counts = [end - start for start, end in zip(starts, ends, strict=True)]
        rows = np.repeat(np.array(scales, np.float32), counts)
        return cls(
            adapters,
            starts,
            torch.tensor(ends, dtype=torch.int32).to(like.device, non_blocking=True),
            rank,
            torch.from_numpy(rows).to(like.device).unsqueeze(1),
            _Homes.of(adapters, rank, like.device),
        )

    @property
    def any(self) -> bool:
        return any(adapter is not None for adapter in self.adapters)

    @property
    def only(self) -> Adapter | None:
        """The adapter of all rows, if its factors need no padding."""
        first = self.adapters[0]
        return first if len(self.adapters) == 1 and first and first.spec.rank == self.rank else None

    def scale(self, hidden: torch.Tensor) -> torch.Tensor:
        """Each row of ``hidden`` [N, R] times its adapter's scale, in place; reckoned in float32, since most
        scales are no number of bfloat16."""
        return hidden.mul_(self.row_scales)

    def a(self, index: int, like: torch.Tensor) -> torch.Tensor:
        """A of one target for every group: [G, rank, width], zero where there is none."""
        return self._stack(index, "a", like)

    def b_t(self, index: int, like: torch.Tensor) -> torch.Tensor:
        return self._stack(index, "b_t", like)

    def of_experts(self, index: int, side: Side, num_experts: int, like: torch.Tensor) -> torch.Tensor:
        """The factor that each expert has of its own: [E * G, rank, width], in the order of block_ends."""
        if self.homes is not None and self.only is None:
            pool = self.homes.pool(self.homes.compute, self._columns(index, side), self.rank)
            taken = _split_experts(pool, num_experts).index_select(1, self.homes.slots)
            if self.homes.blank is not None:
                taken.masked_fill_(self.homes.blank.view(1, -1, 1, 1), 0)
            return taken.flatten(0, 1)
        return _split_experts(self._stack(index, side, like), num_experts).flatten(0, 1)

    def _stack(self, index: int, side: Side, like: torch.Tensor) -> torch.Tensor:
        if self.only is not None:
            return _factor(self.only, index, side).unsqueeze(0)
        columns = self._columns(index, side)
        if self.homes is not None:
            stack = self.homes.pool(self.homes.compute, columns, self.rank).index_select(0, self.homes.slots)
            return stack if self.homes.blank is None else stack.masked_fill_(self.homes.blank, 0)
        none = like.new_zeros(self.rank, columns.stop - columns.start)
        return torch.stack(
            [none if a is None else self._padded(_factor(a, index, side)) for a in self.adapters]
        )

    def _padded(self, factor: torch.Tensor) -> torch.Tensor:
        missing = self.rank - factor.shape[0]
        return F.pad(factor, (0, 0, 0, missing)) if missing else factor

    def _columns(self, index: int, side: Side) -> slice:
        found = [adapter for adapter in self.adapters if adapter is not None]
        target = found[0].layout.targets[index]
        start, width = (target.a_offset, target.a_width) if side == "a" else (target.b_offset, target.b_width)
        return slice(start, start + width)

    def accumulate(self, index: int, side: Side, gradients: torch.Tensor, num_experts: int = 0) -> None:
        """Add [G, rank, width] to the adapters' gradients. num_experts: gradients are [E * G, rank, part], as
        ``of_experts`` gives the factor."""
        owned = [(group, adapter) for group, adapter in enumerate(self.adapters) if adapter is not None]
        if not owned:
            return
        if num_experts:
            gradients = gradients.unflatten(0, (num_experts, -1))
        homes = self.homes
        if homes is not None and homes.distinct and len(owned) > 1:
            pool = homes.pool(homes.grads, self._columns(index, side), self.rank)
            axis, pool = (1, _split_experts(pool, num_experts)) if num_experts else (0, pool)
            if homes.owned is not None:
                gradients = gradients.index_select(axis, homes.owned)
            pool.index_add_(axis, homes.owners, gradients.float())
            for _, adapter in owned:
                adapter.grad_rows = max(adapter.grad_rows, self.rank)
            return
        # An adapter comes once for each rank that has rows of it: one after the other, in a fixed order.
        for group, adapter in owned:
            target = _gradient(adapter, index, side)
            part = gradients[:, group] if num_experts else gradients[group]
            into = _split_experts(target.unsqueeze(0), num_experts)[:, 0] if num_experts else target
            into.add_(part[..., : adapter.spec.rank, :])


@dataclass(frozen=True, slots=True)
class _Homes:
    """Slots of all groups in one pool. slots: int64 [G], 0 where ``blank`` [G, 1, 1] says there is none.

    owners: the slots of groups that have an adapter, and owned which groups these are (None: all). distinct:
    no slot comes twice.
    """

    compute: torch.Tensor
    grads: torch.Tensor
    slots: torch.Tensor
    blank: torch.Tensor | None
    owners: torch.Tensor
    owned: torch.Tensor | None
    distinct: bool

    @classmethod
    def of(cls, adapters: Sequence[Adapter | None], rank: int, device: torch.device) -> _Homes | None:
        """None if the adapters are not all in one pool, or it has fewer than ``rank`` rows a slot."""
        homes = [adapter.home if adapter else None for adapter in adapters]
        found = [home for home in homes if home is not None]
        if len(found) < sum(adapter is not None for adapter in adapters) or not found:
            return None
        if any(home.compute is not found[0].compute for home in found) or found[0].compute.shape[1] < rank:
            return None
        gaps = len(found) < len(homes)

        def tensor(values: list[Any]) -> torch.Tensor:
            return torch.tensor(values).to(device, non_blocking=True)

        slots = tensor([home.slot if home else 0 for home in homes])
        return cls(
            found[0].compute,
            found[0].grads,
            slots,
            tensor([home is None for home in homes]).view(-1, 1, 1) if gaps else None,
            tensor([home.slot for home in found]) if gaps else slots,
            tensor([group for group, home in enumerate(homes) if home]) if gaps else None,
            len({home.slot for home in found}) == len(found),
        )

    @staticmethod
    def pool(blocks: torch.Tensor, columns: slice, rank: int) -> torch.Tensor:
        return blocks[:, :rank, columns]


def _factor(adapter: Adapter, index: int, side: Side) -> torch.Tensor:
    factors = adapter.factors(index)
    return factors.a if side == "a" else factors.b_t


def _gradient(adapter: Adapter, index: int, side: Side) -> torch.Tensor:
    factors = adapter.factors(index)
    gradient = factors.grad_a if side == "a" else factors.grad_b_t
    assert gradient is not None, "backward through a frozen adapter"
    return gradient


def _split_experts(stack: torch.Tensor, num_experts: int) -> torch.Tensor:
    """[G, R, E * I] -> a view [E, G, R, I]."""
    return stack.unflatten(2, (num_experts, -1)).permute(2, 0, 1, 3)


def bounds_of(segments: Sequence[Segment], num_rows: int) -> list[tuple[Adapter | None, int]]:
    """(adapter, first row) of consecutive stretches that cover all rows, gaps included."""
    bounds: list[tuple[Adapter | None, int]] = []
    position = 0
    for adapter, start, end in segments:
        if start > position:
            bounds.append((None, position))
        bounds.append((adapter, start))
        position = end
    if position < num_rows or not bounds:
        bounds.append((None, position))
    return bounds


def _mm(rows: torch.Tensor, stack: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    """rows [N, K] times the matrix of its group in ``stack`` [G, K, M]: [N, M]."""
    return F.grouped_mm(rows, stack, offs=ends)


def _outer(left: torch.Tensor, right: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    """left^T right of each group's rows, [N, K] and [N, M]: [G, K, M]."""
    return F.grouped_mm(left.t(), right, offs=ends)


class GroupedLinear(torch.autograd.Function):
    """layers._LoraLinear: y = x W^T + bias; y[segment] += scale (x A^T) B^T."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        groups: Stretches,
        index: int,
    ) -> torch.Tensor:
        a, b_t = groups.a(index, x), groups.b_t(index, x)
        hidden = groups.scale(_mm(x, a.transpose(1, 2), groups.ends))
        y = F.linear(x, weight, bias)
        y += _mm(hidden, b_t, groups.ends)
        ctx.save_for_backward(x, weight, hidden)
        ctx.groups, ctx.index = groups, index
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight, hidden = ctx.saved_tensors
        groups, index, dy = ctx.groups, ctx.index, dy.contiguous()
        dhidden = groups.scale(_mm(dy, groups.b_t(index, x).transpose(1, 2), groups.ends))
        groups.accumulate(index, "b_t", _outer(hidden, dy, groups.ends))
        groups.accumulate(index, "a", _outer(dhidden, x, groups.ends))
        return dy @ weight + _mm(dhidden, groups.a(index, x), groups.ends), None, None, None, None


class GroupedExperts(torch.autograd.Function):
    """experts._Experts: out[t] = sum_k w[t,k] down_e(act(gate_e(x)) * up_e(x)), each with LoRA on it."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weights: torch.Tensor,
        module: Any,
        groups: Stretches,
        pairs: PairGroups,
        targets: Any,
    ) -> torch.Tensor:
        num_experts, inner = module.gate_up_proj.shape[0], module.gate_up_proj.shape[1] // 2
        gate_up = _mm(x[pairs.token], module.gate_up_proj.transpose(1, 2), pairs.expert_ends)
        hidden = []
        if groups.any:
            for half, index in ((slice(0, inner), targets.gate), (slice(inner, None), targets.up)):
                shared = groups.scale(_mm(x, groups.a(index, x).transpose(1, 2), groups.ends))
                own = groups.of_experts(index, "b_t", num_experts, x)
                gate_up[:, half] += _mm(shared[pairs.token], own, pairs.block_ends)
                hidden.append(shared)
        z = activate(module, gate_up)
        out = combine(_mm(z, module.down_proj.transpose(1, 2), pairs.expert_ends), weights, pairs.inverse)
        if groups.any:
            own = groups.of_experts(targets.down, "a", num_experts, x)
            down = combine(_mm(z, own.transpose(1, 2), pairs.block_ends), weights, pairs.inverse)
            hidden.append(groups.scale(down))
            out += _mm(down, groups.b_t(targets.down, x), groups.ends)
        ctx.save_for_backward(x, weights, gate_up, *hidden)
        ctx.module, ctx.groups, ctx.pairs, ctx.targets = module, groups, pairs, targets
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weights, gate_up, *hidden = ctx.saved_tensors
        module, pairs = ctx.module, ctx.pairs
        z, dout = activate(module, gate_up), dout.contiguous()
        pair_weights = weights.reshape(-1)[pairs.order].unsqueeze(1).to(z.dtype)
        dz = _mm(dout[pairs.token], module.down_proj, pairs.expert_ends)
        if hidden:
            dz += _backward_down(ctx, z, dout, pair_weights, hidden[2])
        dweights = with_blank((z * dz).sum(1), pairs.inverse)[pairs.inverse].view_as(weights)
        dgate_up = backward_activation(module, gate_up, dz.mul_(pair_weights))
        dx = sum_over_experts(
            _mm(dgate_up, module.gate_up_proj, pairs.expert_ends), pairs.inverse, weights.shape[1]
        )
        if hidden:
            _backward_gate_up(ctx, x, dx, dgate_up, hidden[:2])
        return dx, dweights, None, None, None, None


def _backward_down(
    ctx: Any, z: torch.Tensor, dout: torch.Tensor, pair_weights: torch.Tensor, down: torch.Tensor
) -> torch.Tensor:
    """What the low-rank product of down adds to dz of every pair; adds the gradients of its A and B."""
    groups, pairs, index = ctx.groups, ctx.pairs, ctx.targets.down
    num_experts = ctx.module.down_proj.shape[0]
    dhidden = groups.scale(_mm(dout, groups.b_t(index, z).transpose(1, 2), groups.ends))
    groups.accumulate(index, "b_t", _outer(down, dout, groups.ends))
    dpairs = dhidden[pairs.token]
    groups.accumulate(index, "a", _outer(dpairs * pair_weights, z, pairs.block_ends), num_experts)
    return _mm(dpairs, groups.of_experts(index, "a", num_experts, z), pairs.block_ends)


def _backward_gate_up(
    ctx: Any, x: torch.Tensor, dx: torch.Tensor, dgate_up: torch.Tensor, hidden: Sequence[torch.Tensor]
) -> None:
    """Adds the gradients of A and B of gate and up, and their part of dx."""
    groups, pairs, targets = ctx.groups, ctx.pairs, ctx.targets
    num_experts, inner = ctx.module.gate_up_proj.shape[0], dgate_up.shape[1] // 2
    top_k = ctx.saved_tensors[1].shape[1]
    halves = (dgate_up[:, :inner].contiguous(), dgate_up[:, inner:].contiguous())
    for dhalf, index, shared in zip(halves, (targets.gate, targets.up), hidden, strict=True):
        own = groups.of_experts(index, "b_t", num_experts, x)
        dpairs = _mm(dhalf, own.transpose(1, 2), pairs.block_ends)
        dhidden = groups.scale(sum_over_experts(dpairs, pairs.inverse, top_k))
        groups.accumulate(index, "b_t", _outer(shared[pairs.token], dhalf, pairs.block_ends), num_experts)
        groups.accumulate(index, "a", _outer(dhidden, x, groups.ends))
        dx += _mm(dhidden, groups.a(index, x), groups.ends)
