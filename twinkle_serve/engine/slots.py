"""Adapters in memory: the training slots (weights, gradients, Adam moments) and views of single factors.

A slot is one row of four pooled tensors ``[slots, max_rank, row_size]``, and a run of rank r uses the first r
rank rows of it, one contiguous block (layout.py). So a snapshot, a page-out or an optimizer step is one pass
over one block. Knows nothing of runs, requests or of which slot to use (control/residency.py decides).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch

from twinkle_serve.engine.layout import AdapterLayout, Group
from twinkle_serve.protocol.data import LoraSpec

LORA_ALPHA = 32
"""Tinker's alpha: the low-rank product is scaled by 32 / rank."""


class Factors(NamedTuple):
    """Both factors of one target, each also transposed: A ``[r, in]`` and B ``[out, r]`` in the base model's
    type; the gradients of A and of B transposed, in float32, where the adapter is being trained. All are
    views."""

    a: torch.Tensor
    a_t: torch.Tensor
    b: torch.Tensor
    b_t: torch.Tensor
    grad_a: torch.Tensor | None
    grad_b_t: torch.Tensor | None


class Home(NamedTuple):
    """Where an adapter lies among others: ``slot`` of ``compute`` and ``grads``, both [slots, max_rank,
    row_size]. So one kernel can take a factor of many adapters: ``compute`` is zero beyond an adapter's rank,
    and what ``grads`` has there means nothing."""

    compute: torch.Tensor
    grads: torch.Tensor
    slot: int


class Adapter:
    """One adapter's block of weights ``[rank, row_size]``, seen target by target.

    grads: a block of the same shape that backward passes add to, or None for a frozen adapter.
    dtype: what the matrix products run in. If it is not that of the weights, they are copied to it once per
    change, which whoever changes them says by ``refresh``. ``compute``: that copy, if there is one already.
    home: the pool it lies in, if it does.
    """

    def __init__(
        self,
        layout: AdapterLayout,
        spec: LoraSpec,
        weights: torch.Tensor,
        grads: torch.Tensor | None = None,
        dtype: torch.dtype = torch.float32,
        compute: torch.Tensor | None = None,
        home: Home | None = None,
    ) -> None:
        self.layout = layout
        self.spec = spec
        self.home = home
        self.weights = weights
        self.grads = grads
        self.scale = LORA_ALPHA / spec.rank
        # Gradients of adapters of several ranks are added padded to the largest (grouped.py). A padded row's
        # are sums of zeros, but zero times what is not finite is NaN: whoever comes next must not find that.
        self.grad_rows = spec.rank
        # The same tensor if the type is the same.
        self._compute = weights.to(dtype) if compute is None else compute
        # Views are kept: making one costs more than the small matrix products they are made for.
        self._factors: list[Factors | None] = [None] * len(layout.targets)
        self._expert_factors: dict[tuple[int, int], Factors] = {}

    def refresh(self) -> None:
        """The weights have changed."""
        if self._compute.data_ptr() != self.weights.data_ptr():
            self._compute.copy_(self.weights)

    def factors(self, target_index: int) -> Factors:
        """One target's factors. Those of fused experts lie side by side (layout.py)."""
        found = self._factors[target_index]
        if found is None:
            target = self.layout.targets[target_index]
            found = self._views(
                slice(target.a_offset, target.a_offset + target.a_width),
                slice(target.b_offset, target.b_offset + target.b_width),
            )
            self._factors[target_index] = found
        return found

    def expert_factors(self, target_index: int, expert: int) -> Factors:
        """The factors of one expert; the one on the hidden side is that of all experts."""
        found = self._expert_factors.get((target_index, expert))
        if found is None:
            target = self.layout.targets[target_index]
            own_a = target.kind == "expert_down"
            a_start = target.a_offset + (expert * target.in_features if own_a else 0)
            b_start = target.b_offset + (0 if own_a else expert * target.out_features)
            found = self._views(
                slice(a_start, a_start + target.in_features), slice(b_start, b_start + target.out_features)
            )
            self._expert_factors[target_index, expert] = found
        return found

    def _views(self, a_columns: slice, b_columns: slice) -> Factors:
        a, b_t = self._compute[:, a_columns], self._compute[:, b_columns]
        if self.grads is None:
            return Factors(a, a.t(), b_t.t(), b_t, None, None)
        return Factors(a, a.t(), b_t.t(), b_t, self.grads[:, a_columns], self.grads[:, b_columns])


class Segment(NamedTuple):
    """Rows ``start:end`` of a packed batch belong to ``adapter``."""

    adapter: Adapter
    start: int
    end: int


def trained_groups(spec: LoraSpec) -> frozenset[Group]:
    """The groups of targets that a run trains."""
    flags: list[tuple[Group, bool]] = [
        ("attn", spec.train_attn),
        ("mlp", spec.train_mlp),
        ("unembed", spec.train_unembed),
    ]
    return frozenset(group for group, trained in flags if trained)


def initialize(layout: AdapterLayout, spec: LoraSpec, weights: torch.Tensor) -> None:
    """Fill a zeroed block with a fresh adapter: A uniform in +-1/sqrt(in_features), B zero.

    Depends on the seed and the layout only, never on the slot or the device, nor on how many of the experts
    are here: all of them are drawn. Groups that are not trained stay zero, so they add exactly nothing and
    have no gradient.
    """
    generator = torch.Generator().manual_seed(spec.seed % 2**63)
    groups = trained_groups(spec)
    for target in layout.targets:
        bound = 1 / math.sqrt(target.in_features)
        width, first = target.a_of_all
        a = torch.empty(spec.rank, width).uniform_(-bound, bound, generator=generator)
        if target.group in groups:
            layout.a(weights, target).copy_(a[:, first : first + target.a_width])


@dataclass(slots=True)
class AdapterState:
    """Everything a run is, outside a slot: blocks ``[rank, row_size]`` in float32 on the CPU.

    grads is None when nothing was accumulated since the last step, moments are None before the first step.
    """

    spec: LoraSpec
    weights: torch.Tensor
    grads: torch.Tensor | None = None
    exp_avg: torch.Tensor | None = None
    exp_avg_sq: torch.Tensor | None = None
    step: int = 0

    def num_bytes(self) -> int:
        blocks = (self.weights, self.grads, self.exp_avg, self.exp_avg_sq)
        return sum(block.nbytes for block in blocks if block is not None)


class SlotPool:
    """The training slots. A free slot is all zeros in all four tensors. ``dtype``: see Adapter."""

    def __init__(
        self,
        layout: AdapterLayout,
        num_slots: int,
        max_rank: int,
        device: torch.device,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.layout = layout
        shape = (num_slots, max_rank, layout.row_size)
        # torch.zeros leaves pages untouched on the CPU, so unused slots and rank rows take no memory.
        self.weights = torch.zeros(shape, device=device)
        same = dtype == torch.float32
        self._compute = self.weights if same else torch.zeros(shape, dtype=dtype, device=device)
        self.grads = torch.zeros(shape, device=device)
        self.exp_avg = torch.zeros(shape, device=device)
        self.exp_avg_sq = torch.zeros(shape, device=device)
        self.steps = [0] * num_slots
        self.has_grads = [False] * num_slots
        self._adapters: list[Adapter | None] = [None] * num_slots

    @property
    def num_slots(self) -> int:
        return len(self._adapters)

    @property
    def max_rank(self) -> int:
        return self.weights.shape[1]

    @property
    def weight_bytes(self) -> int:
        """Of the weights, and of their copy in the base model's type if that is another one."""
        return self.weights.nbytes + (0 if self._compute is self.weights else self._compute.nbytes)

    def is_occupied(self, slot: int) -> bool:
        return self._adapters[slot] is not None

    def adapter(self, slot: int) -> Adapter:
        """The adapter in an occupied slot."""
        found = self._adapters[slot]
        assert found is not None, f"slot {slot} is free"
        return found

    def blocks(self, slot: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Weights, gradients, exp_avg and exp_avg_sq of an occupied slot, each ``[rank, row_size]``."""
        rank = self.adapter(slot).spec.rank
        return (
            self.weights[slot, :rank],
            self.grads[slot, :rank],
            self.exp_avg[slot, :rank],
            self.exp_avg_sq[slot, :rank],
        )

    def create(self, slot: int, spec: LoraSpec) -> None:
        """Put a fresh adapter into a free slot."""
        self._occupy(slot, spec)
        initialize(self.layout, spec, self.weights[slot, : spec.rank])
        self.adapter(slot).refresh()

    def put(self, slot: int, state: AdapterState) -> None:
        """Put a saved run into a free slot, exactly as it was."""
        self._occupy(slot, state.spec)
        targets = self.blocks(slot)
        sources = (state.weights, state.grads, state.exp_avg, state.exp_avg_sq)
        for target, source in zip(targets, sources, strict=True):
            if source is not None:
                target.copy_(source)
        self.steps[slot] = state.step
        self.has_grads[slot] = state.grads is not None
        self.adapter(slot).refresh()

    def state(self, slot: int, *, grads: bool = True, optimizer: bool = True) -> AdapterState:
        """A copy of an occupied slot on the CPU, later changes not included."""
        weights, gradients, exp_avg, exp_avg_sq = self.blocks(slot)
        stepped = optimizer and self.steps[slot] > 0
        return AdapterState(
            spec=self.adapter(slot).spec,
            weights=_host_copy(weights),
            grads=_host_copy(gradients) if grads and self.has_grads[slot] else None,
            exp_avg=_host_copy(exp_avg) if stepped else None,
            exp_avg_sq=_host_copy(exp_avg_sq) if stepped else None,
            step=self.steps[slot] if optimizer else 0,
        )

    def free(self, slot: int) -> None:
        """Scrub a slot. Freeing a free slot does nothing."""
        if self._adapters[slot] is None:
            return
        for block in self.blocks(slot):
            block.zero_()
        adapter = self.adapter(slot)
        if self._compute is not self.weights:
            self._compute[slot, : adapter.spec.rank].zero_()
        # Here and not at each step: no run reads gradients beyond its own rank. And no row that was never
        # written to, which would take memory (see __init__).
        self.grads[slot, adapter.spec.rank : adapter.grad_rows].zero_()
        self._adapters[slot] = None
        self.steps[slot] = 0
        self.has_grads[slot] = False

    def clear_grads(self, slot: int) -> None:
        self.grads[slot, : self.adapter(slot).spec.rank].zero_()
        self.has_grads[slot] = False

    def _occupy(self, slot: int, spec: LoraSpec) -> None:
        assert self._adapters[slot] is None, f"slot {slot} is taken"
        assert spec.rank <= self.max_rank
        rank = spec.rank
        self._adapters[slot] = Adapter(
            self.layout,
            spec,
            self.weights[slot, :rank],
            self.grads[slot, :rank],
            compute=self._compute[slot, :rank],
            home=Home(self._compute, self.grads, slot),
        )


def _host_copy(block: torch.Tensor) -> torch.Tensor:
    return block.to("cpu", copy=True)
