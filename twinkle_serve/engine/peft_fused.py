"""Experts of a layer as PEFT has them where it wraps their fused parameters: two tensors for each of A and B.

Knows that layout: gate above up in one product of twice the rank, whose B holds two blocks and zeros beside
them; B has the first column of each expert, then the second ones. Does not know which families are written so
(sharding/families.py) or anything but experts (peft_format.py).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch

from twinkle_serve.engine.layout import AdapterLayout, Target
from twinkle_serve.engine.sharding.families import Part
from twinkle_serve.protocol.errors import UserError

# Of two parameters of a module PEFT wraps the second one around the first.
GATE_UP, DOWN = ".base_layer", ""
_HEIGHT = {"gate": 0, "up": 1}


def placement(rank: int, alpha: int) -> dict[str, Any]:
    """What adapter_config.json says so that PEFT wraps the experts."""
    return {
        "target_parameters": ["mlp.experts.down_proj", "mlp.experts.gate_up_proj"],
        "rank_pattern": {r".*\.experts\.gate_up_proj": 2 * rank},
        "alpha_pattern": {r".*\.experts\.gate_up_proj": 2 * alpha},
    }


def fused(layout: AdapterLayout, block: torch.Tensor, prefix: str) -> Iterator[tuple[str, torch.Tensor]]:
    """The keys and tensors of every layer's experts. block: ``[rank, row_size]``."""
    rank = block.shape[0]
    for gate, up, down in blocks(layout):
        name, num, inner = f"{prefix}{gate.path}", gate.num_experts, gate.out_features
        a = torch.cat([layout.a(block, gate), layout.a(block, up)])
        b = block.new_zeros(2 * inner, 2 * rank, num)
        b[:inner, :rank] = layout.b_t(block, gate).reshape(rank, num, inner).permute(2, 0, 1)
        b[inner:, rank:] = layout.b_t(block, up).reshape(rank, num, inner).permute(2, 0, 1)
        yield f"{name}{GATE_UP}.lora_A.weight", a.repeat(num, 1)
        yield f"{name}{GATE_UP}.lora_B.weight", b.reshape(2 * inner, -1)
        a = layout.a(block, down).reshape(rank, num, inner).transpose(0, 1).reshape(num * rank, inner)
        yield f"{name}{DOWN}.lora_A.weight", a.clone()
        yield f"{name}{DOWN}.lora_B.weight", layout.b_t(block, down).t().repeat_interleave(num, 1)


def one_by_one(
    layout: AdapterLayout, tensors: Mapping[str, torch.Tensor], rank: int, prefix: str
) -> dict[str, torch.Tensor]:
    """The same tensors, with an entry for each expert where they have one for all; views of them.

    Raises UserError, naming the key.
    """
    rest = dict(tensors)
    for gate, _, down in blocks(layout):
        hidden, inner, num = gate.in_features, gate.out_features, gate.num_experts
        parts: tuple[Part, ...]
        for suffix, parts, shapes in (
            (GATE_UP, ("gate", "up"), ((num * 2 * rank, hidden), (2 * inner, 2 * rank * num))),
            (DOWN, ("down",), ((num * rank, inner), (hidden, rank * num))),
        ):
            keys = [f"{prefix}{gate.path}{suffix}.lora_{factor}.weight" for factor in "AB"]
            if not any(key in rest for key in keys):
                continue
            pair = [_take(rest, key, shape) for key, shape in zip(keys, shapes, strict=True)]
            if len(parts) == 2:
                _check_blocks(pair[1].reshape(2, inner, 2, rank, num), keys[1])
            for expert in range(num):
                for part in parts:
                    module = f"{prefix}{layout.family.expert(down.path, expert, part)}"
                    a, b = of_expert(pair[0], pair[1], part, expert, rank)
                    rest[f"{module}.lora_A.weight"], rest[f"{module}.lora_B.weight"] = a, b
    return rest


def of_expert(
    a: torch.Tensor, b: torch.Tensor, part: Part, expert: int, rank: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """A ``[rank, in]`` and B ``[out, rank]`` of a part of one expert. a, b: of all experts of its layer."""
    if part == "down":
        return a[expert * rank : (expert + 1) * rank], b[:, expert :: a.shape[0] // rank]
    num, inner, row = a.shape[0] // (2 * rank), b.shape[0] // 2, _HEIGHT[part]
    first = (2 * expert + row) * rank
    columns = b[row * inner : (row + 1) * inner, expert::num]
    return a[first : first + rank], columns[:, row * rank : (row + 1) * rank]


def blocks(layout: AdapterLayout) -> Iterator[tuple[Target, Target, Target]]:
    """Gate, up and down of every layer that has experts."""
    experts = [target for target in layout.targets if target.num_experts]
    yield from zip(experts[::3], experts[1::3], experts[2::3], strict=True)


def _take(tensors: dict[str, torch.Tensor], key: str, shape: tuple[int, int]) -> torch.Tensor:
    tensor = tensors.pop(key, None)
    if tensor is None:
        raise UserError(f"the adapter lacks tensors: {key}")
    if tensor.shape != shape:
        raise UserError(f"{key} has shape {list(tensor.shape)}; this base model needs {list(shape)}")
    return tensor


def _check_blocks(b: torch.Tensor, key: str) -> None:
    """b: ``[2, inner, 2, rank, experts]``."""
    if b[0, :, 1].any() or b[1, :, 0].any():
        raise UserError(
            f"{key} mixes gate_proj and up_proj; only adapters with factors for each of the two can be loaded"
        )
