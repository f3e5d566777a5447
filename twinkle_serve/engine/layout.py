"""Where each LoRA factor of an adapter lives inside the adapter's one block of floats.

Knows the columns of a block ``[rank, row_size]``: row k holds the k-th row of every A and the k-th column of
every B. Does not know the base model, what the numbers mean, or how slots are pooled (slots.py).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Literal

import torch

from twinkle_serve.engine.sharding.families import DENSE, Family

ALIGNMENT = 16
"""Offsets and row sizes are multiples of this many floats, so that every view is 64-byte aligned."""

Kind = Literal["linear", "expert_gate", "expert_up", "expert_down"]
Group = Literal["attn", "mlp", "unembed"]


@dataclass(frozen=True, slots=True)
class Target:
    """One module that LoRA is applied to.

    path: the module in the Hugging Face model, e.g. ``model.layers.0.self_attn.q_proj``, ``lm_head``, or
    ``model.layers.0.mlp.experts`` (three targets, one for each kind).
    in_features, out_features: of one expert where the target is one of fused experts.
    num_experts: 0 for a linear layer. The factor on the hidden side is shared by the experts: A of gate and
    up, B of down; the other one has ``num_experts`` parts side by side.
    first_expert, total_experts: which of the layer's experts these are, where a rank holds some of them
    (sharding/shares.py); total 0 stands for all.
    a_offset, b_offset: first column of A and of B; ``AdapterLayout.build`` sets them.
    """

    kind: Kind
    path: str
    group: Group
    in_features: int
    out_features: int
    num_experts: int = 0
    a_offset: int = -1
    b_offset: int = -1
    first_expert: int = 0
    total_experts: int = 0

    @property
    def a_width(self) -> int:
        """Columns of A in a block: those of all experts where A is per expert."""
        return self.in_features * (self.num_experts if self.a_per_expert else 1)

    @property
    def b_width(self) -> int:
        """Columns of B in a block: those of all experts where B is per expert."""
        return self.out_features * (self.num_experts if self.b_per_expert else 1)

    @property
    def a_per_expert(self) -> bool:
        return self.kind == "expert_down"

    @property
    def b_per_expert(self) -> bool:
        return self.kind in ("expert_gate", "expert_up")

    @property
    def a_of_all(self) -> tuple[int, int]:
        """The width of A over all experts of the layer, and where in it these experts' part begins."""
        if not self.a_per_expert:
            return self.a_width, 0
        return self.in_features * (
            self.total_experts or self.num_experts
        ), self.in_features * self.first_expert


@dataclass(frozen=True, slots=True)
class AdapterLayout:
    """The columns of every adapter of one base model.

    row_size: floats per rank, padding included. A block is float32 ``[rank, row_size]``; a pool of blocks is
    ``[slots, max_rank, row_size]``. Padding columns stay zero.
    family: what an adapter's files call experts.
    """

    targets: tuple[Target, ...]
    row_size: int
    family: Family = DENSE

    @classmethod
    def build(cls, targets: Iterable[Target], family: Family = DENSE) -> AdapterLayout:
        """Give targets their offsets, in the order they come.

        Raises ValueError when two targets have the same path and kind, or a shape makes no sense.
        """
        placed: list[Target] = []
        seen: set[tuple[str, str]] = set()
        end = 0
        for target in targets:
            _check(target)
            if (target.path, target.kind) in seen:
                raise ValueError(f"LoRA target {target.path} ({target.kind}) is listed twice")
            seen.add((target.path, target.kind))
            a_offset = end
            b_offset = aligned(a_offset + target.a_width)
            end = aligned(b_offset + target.b_width)
            placed.append(replace(target, a_offset=a_offset, b_offset=b_offset))
        return cls(tuple(placed), end, family)

    def a(self, block: torch.Tensor, target: Target) -> torch.Tensor:
        """A of a target: a view ``[..., rank, a_width]`` of a block or of a pool of blocks."""
        return block[..., target.a_offset : target.a_offset + target.a_width]

    def b_t(self, block: torch.Tensor, target: Target) -> torch.Tensor:
        """B of a target, transposed: a view ``[..., rank, b_width]`` of a block or of a pool of blocks."""
        return block[..., target.b_offset : target.b_offset + target.b_width]

    def num_parameters(self, rank: int, groups: Iterable[Group] = ("attn", "mlp", "unembed")) -> int:
        """Trained floats of an adapter of this rank, padding not counted."""
        wanted = set(groups)
        return rank * sum(t.a_width + t.b_width for t in self.targets if t.group in wanted)


def aligned(offset: int) -> int:
    """The next offset at which something may begin."""
    return -(-offset // ALIGNMENT) * ALIGNMENT


def _check(target: Target) -> None:
    if target.in_features < 1 or target.out_features < 1:
        raise ValueError(f"LoRA target {target.path}: features must be >= 1")
    if (target.kind == "linear") != (target.num_experts == 0):
        raise ValueError(f"LoRA target {target.path}: kind {target.kind} with {target.num_experts} experts")
