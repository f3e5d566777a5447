"""The feed-forward part of a layer without gradients: dense, or a mixture of experts.

Knows projections, routing and low-rank products. Does not know attention or what a row is (inference.py).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from twinkle_serve.engine.adapter_pool import Block
from twinkle_serve.engine.base_model import BaseModel
from twinkle_serve.engine.frozen import ROWS_WORTH_PACKED, matrices, packed, product, product_into
from twinkle_serve.engine.layers import LoraLinear

Activation = Callable[[torch.Tensor], torch.Tensor]


class Mlp(Protocol):
    def __call__(self, residual: torch.Tensor, h: torch.Tensor, blocks: Sequence[Block]) -> torch.Tensor:
        """``residual`` [T, H] plus what the layer makes of ``h`` [T, H]."""
        ...


@dataclass(frozen=True, slots=True)
class Projection:
    """A frozen linear layer and the LoRA target it is. ``width``: of its output."""

    weight: torch.Tensor
    weight_t: torch.Tensor
    is_packed: bool
    bias: torch.Tensor | None
    target: int
    width: int

    @classmethod
    def of(cls, module: LoraLinear) -> Projection:
        (weight,) = matrices(module.base.weight)
        has_own = packed(weight) is not None
        return cls(weight, weight.t(), has_own, module.base.bias, module.target_index, weight.shape[0])

    def into(self, out: torch.Tensor, x: torch.Tensor, blocks: Sequence[Block]) -> None:
        """out = x W^T + bias, and the low-rank products."""
        if self.is_packed:
            product_into(out, x, self.weight)
        else:
            torch.mm(x, self.weight_t, out=out)
        self._finish(out, x, blocks)

    def add_to(self, residual: torch.Tensor, x: torch.Tensor, blocks: Sequence[Block]) -> torch.Tensor:
        """residual + x W^T + bias, and the low-rank products."""
        if self.is_packed and x.shape[0] >= ROWS_WORTH_PACKED:
            out = residual + product(x, self.weight)
        else:
            out = torch.addmm(residual, x, self.weight_t)
        self._finish(out, x, blocks)
        return out

    def _finish(self, out: torch.Tensor, x: torch.Tensor, blocks: Sequence[Block]) -> None:
        if self.bias is not None:
            out.add_(self.bias)
        for block in blocks:
            block.add(out, x, *block.views.linear(self.target))


@dataclass(frozen=True, slots=True)
class DenseMlp:
    gate: Projection
    up: Projection
    down: Projection
    activation: Activation

    def __call__(self, residual: torch.Tensor, h: torch.Tensor, blocks: Sequence[Block]) -> torch.Tensor:
        gate_up = h.new_empty(h.shape[0], 2 * self.gate.width)
        gate, up = gate_up.chunk(2, 1)
        self.gate.into(gate, h, blocks)
        self.up.into(up, h, blocks)
        return self.down.add_to(residual, self.activation(gate).mul_(up), blocks)


class _Pairs(NamedTuple):
    """Token-expert pairs sorted by expert, and within an expert by token.

    token: int64 [P]. place: int64 [P], where the pairs of token 0, then 1, ... are. parts: (expert, number
    of its pairs). cuts: for each block, (expert's number in ``parts``, first pair, pair after the last).
    """

    token: torch.Tensor
    place: torch.Tensor
    parts: list[tuple[int, int]]
    cuts: list[list[tuple[int, int, int]]]


@dataclass(frozen=True, slots=True)
class ExpertsMlp:
    """router: [E, H]. gate_up: [E, 2I, H] and down: [E, H, I], cut by expert. targets: of gate, up, down."""

    router: torch.Tensor
    top_k: int
    normalized: bool
    gate_up: tuple[torch.Tensor, ...]
    down: tuple[torch.Tensor, ...]
    targets: tuple[int, int, int]
    activation: Activation

    def __call__(self, residual: torch.Tensor, h: torch.Tensor, blocks: Sequence[Block]) -> torch.Tensor:
        weights, chosen = torch.mm(h, self.router).softmax(-1, dtype=torch.float32).topk(self.top_k, dim=-1)
        if self.normalized:
            weights = weights / weights.sum(-1, keepdim=True)
        weights = weights.to(h.dtype).unsqueeze(1)
        pairs = _sort(chosen, len(self.gate_up), blocks)
        gate_up = self._gate_up(h, pairs, blocks)
        gate, up = gate_up.chunk(2, 1)
        z = self.activation(gate).mul_(up)
        out = torch.baddbmm(
            residual.unsqueeze(1), weights, _by_token(self._down(z, pairs), pairs, self.top_k)
        )
        out = out.squeeze(1)
        if blocks:
            self._add_low_rank_down(out, z, weights, pairs, blocks)
        return out

    def _gate_up(self, h: torch.Tensor, pairs: _Pairs, blocks: Sequence[Block]) -> torch.Tensor:
        rows = h.index_select(0, pairs.token)
        sizes = [size for _, size in pairs.parts]
        gate_up = h.new_empty(rows.shape[0], self.gate_up[0].shape[0])
        outs = gate_up.split(sizes)
        for (expert, _), x, out in zip(pairs.parts, rows.split(sizes), outs, strict=True):
            product_into(out, x, self.gate_up[expert])
        inner = gate_up.shape[1] // 2
        for block, cuts in zip(blocks, pairs.cuts, strict=True):
            own = h if block.end - block.start == h.shape[0] else h[block.start : block.end]
            for target, half in (
                (self.targets[0], gate_up[:, :inner]),
                (self.targets[1], gate_up[:, inner:]),
            ):
                hidden = block.own(torch.mm(own, block.views.a_t(target)[0]))
                factors = block.views.b(target)
                tokens = pairs.token if block.start == 0 else (pairs.token - block.start).clamp_(0)
                low = hidden.index_select(0, tokens.clamp(max=block.end - block.start - 1))
                for number, start, end in cuts:
                    expert = pairs.parts[number][0]
                    half[start:end].addmm_(low[start:end], factors[expert], alpha=block.scale)
        return gate_up

    def _down(self, z: torch.Tensor, pairs: _Pairs) -> torch.Tensor:
        out = z.new_empty(z.shape[0], self.down[0].shape[0])
        sizes = [size for _, size in pairs.parts]
        parts = zip(pairs.parts, z.split(sizes), out.split(sizes), strict=True)
        for (expert, _), x, into in parts:
            product_into(into, x, self.down[expert])
        return out

    def _add_low_rank_down(
        self,
        out: torch.Tensor,
        z: torch.Tensor,
        weights: torch.Tensor,
        pairs: _Pairs,
        blocks: Sequence[Block],
    ) -> None:
        """The down product in rank space, summed over a token's experts before its shared B is applied."""
        for block, cuts in zip(blocks, pairs.cuts, strict=True):
            factors, b = block.views.a_t(self.targets[2]), block.views.b(self.targets[2])[0]
            low = z.new_zeros(z.shape[0], b.shape[0])
            for number, start, end in cuts:
                torch.mm(z[start:end], factors[pairs.parts[number][0]], out=low[start:end])
            summed = torch.bmm(weights, _by_token(low, pairs, self.top_k)).squeeze(1)
            rows = slice(block.start, block.end)
            out[rows].addmm_(block.own(summed[rows]), b, alpha=block.scale)


def _by_token(pairs_rows: torch.Tensor, pairs: _Pairs, top_k: int) -> torch.Tensor:
    """Rows of sorted pairs [P, M] in the order of tokens: [T, K, M]."""
    return pairs_rows.index_select(0, pairs.place).view(-1, top_k, pairs_rows.shape[1])


def _sort(chosen: torch.Tensor, num_experts: int, blocks: Sequence[Block]) -> _Pairs:
    """chosen: int64 [T, K]. In numpy: launching operators would cost more than sorting a few pairs."""
    num_tokens, top_k = chosen.shape
    flat = chosen.reshape(-1).cpu().numpy()
    order = np.argsort(flat, kind="stable")
    token = order // top_k
    place = np.empty_like(order)
    place[order] = np.arange(order.size)
    counts = np.bincount(flat, minlength=num_experts).tolist()
    parts = [(expert, count) for expert, count in enumerate(counts) if count]
    device = chosen.device
    return _Pairs(
        torch.from_numpy(token).to(device),
        torch.from_numpy(place).to(device),
        parts,
        [_cuts(block, parts, flat[order], token, num_tokens) for block in blocks],
    )


def _cuts(
    block: Block, parts: list[tuple[int, int]], expert: np.ndarray, token: np.ndarray, num_tokens: int
) -> list[tuple[int, int, int]]:
    """Where each expert's pairs of the block's rows lie."""
    ends = list(accumulate(count for _, count in parts))
    if block.start == 0 and block.end == num_tokens:
        return list(zip(range(len(parts)), [0, *ends[:-1]], ends, strict=True))
    keys = expert * num_tokens + token
    of_part = np.array([e for e, _ in parts]) * num_tokens
    starts = np.searchsorted(keys, of_part + block.start).tolist()
    stops = np.searchsorted(keys, of_part + block.end).tolist()
    return [(n, a, b) for n, (a, b) in enumerate(zip(starts, stops, strict=True)) if a < b]


class RoutedModule:
    """A mixture of experts through its own module: on a GPU its grouped products launch fewer kernels."""

    def __init__(self, module: nn.Module) -> None:
        self._module = module

    def __call__(self, residual: torch.Tensor, h: torch.Tensor, blocks: Sequence[Block]) -> torch.Tensor:
        return residual + self._module(h.unsqueeze(0))[0]


def mlp_of(base: BaseModel, module: Any) -> Mlp | None:
    """None for a module that is neither of the two as usual."""
    names = {name for name, _ in module.named_children()}
    if {"gate_proj", "up_proj", "down_proj", "act_fn"} == names:
        linears = (module.gate_proj, module.up_proj, module.down_proj)
        if not all(isinstance(linear, LoraLinear) for linear in linears):
            return None
        gate, up, down = (Projection.of(linear) for linear in linears)
        return DenseMlp(gate, up, down, _activation(module.act_fn))
    if names != {"gate", "experts"} or not type(module.gate).__name__.endswith("TopKRouter"):
        return None
    if base.segments.grouped:
        return RoutedModule(module)
    router, experts = module.gate, module.experts
    if not hasattr(experts, "twinkle_targets") or set(router.state_dict()) != {"weight"}:
        return None
    targets = experts.twinkle_targets
    return ExpertsMlp(
        router=router.weight.detach().t(),
        top_k=int(router.top_k),
        # A router without a switch, such as Mixtral's, always normalizes.
        normalized=bool(getattr(router, "norm_topk_prob", True)),
        gate_up=matrices(experts.gate_up_proj),
        down=matrices(experts.down_proj),
        targets=(targets.gate, targets.up, targets.down),
        activation=_activation(experts.act_fn),
    )


def _activation(module: Activation) -> Activation:
    """SiLU without the call of a module."""
    is_silu = isinstance(module, nn.SiLU) or type(module).__name__ == "SiLUActivation"
    return F.silu if is_silu else module
