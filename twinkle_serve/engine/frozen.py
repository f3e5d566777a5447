"""Products with the base model's frozen weights, which on a CPU are kept in oneDNN's own layout as well.

A matrix product with few rows spends most of its time bringing the weight into the order that its kernel
reads. Frozen weights can be brought there once: two to four times the speed at 4 to 16 rows (a small batch,
an expert's share, a decode step), a sixth more at 512. It costs twice their memory again, since forward and
backward read different orders. Knows weights; does not know LoRA, layers, or who multiplies.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
import torch.nn.functional as F

_ATTRIBUTE = "twinkle_packed"
_ROWS_HINT = 64
"""oneDNN picks a layout for a number of rows; the one for this many is good from 2 to 512."""
# Below these, the call's own overhead is more than the layout saves.
_SMALLEST_SIDE = 256
_SMALLEST_SIZE = 2**16
ROWS_WORTH_PACKED = 8
"""A decode step of fewer rows is as fast with the plain weight."""
_FEW_ROWS = 8
_ROWS_WORTH_TURNED = 2**14


class Packed(NamedTuple):
    """A weight [out, in] in oneDNN's layout, for x W^T and for dy W."""

    forward: torch.Tensor
    backward: torch.Tensor


def pack(weights: Iterable[torch.Tensor]) -> int:
    """Pack those float32 CPU weights, [out, in] or [E, out, in], that gain from it; returns how many did.

    A packed weight must not change afterwards.
    """
    count = 0
    with torch.no_grad():
        for weight in weights:
            rows, columns = weight.shape[-2:]
            if min(rows, columns) < _SMALLEST_SIDE or rows * columns < _SMALLEST_SIZE:
                continue
            matrices = weight.detach().reshape(-1, rows, columns)
            setattr(weight, _ATTRIBUTE, [_pack(matrix) for matrix in matrices])
            count += 1
    return count


def packed(weight: torch.Tensor, expert: int = 0) -> Packed | None:
    found: list[Packed] | None = getattr(weight, _ATTRIBUTE, None)
    return None if found is None else found[expert]


def packed_bytes(weight: torch.Tensor) -> int:
    """What a weight's second layouts take."""
    found: list[Packed] = getattr(weight, _ATTRIBUTE, [])
    # oneDNN's own layouts do not tell their size; they hold the same numbers, twice.
    return 2 * weight.nbytes if found else 0


def matrices(weights: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The matrices of ``weights`` [E, out, in], or the only one of [out, in], each with its packing."""
    found = tuple(weights.detach().unsqueeze(0) if weights.dim() == 2 else weights.detach())
    for expert, matrix in enumerate(found):
        own = packed(weights, expert)
        if own is not None:
            setattr(matrix, _ATTRIBUTE, [own])
    return found


def product(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x W^T + bias, ``[..., in]`` -> ``[..., out]``. Without gradients."""
    own = packed(weight)
    return F.linear(x, weight, bias) if own is None else _multiply(x, own.forward, bias)


def product_back(dy: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """dy W, ``[N, out]`` -> ``[N, in]``. Without gradients."""
    own = packed(weight)
    return dy @ weight if own is None else _multiply(dy, own.backward, None)


def product_into(out: torch.Tensor, x: torch.Tensor, weight: torch.Tensor) -> None:
    """out [N, out] = x W^T."""
    own, rows = packed(weight), x.shape[0]
    if own is not None and rows >= ROWS_WORTH_PACKED:
        out.copy_(_multiply(x, own.forward, None))
    elif 1 < rows <= _FEW_ROWS and rows * rows * _ROWS_WORTH_TURNED <= weight.numel() and not x.is_cuda:
        # With the weights on the left, MKL reads large ones up to three times faster for two to eight rows.
        out.copy_(torch.mm(weight, x.t()).t())
    else:
        torch.mm(x, weight.t(), out=out)


def expert_product(x: torch.Tensor, weights: torch.Tensor, expert: int, out: torch.Tensor) -> None:
    """out[N, out] = x W_e^T, of ``weights`` [E, out, in]."""
    own = packed(weights, expert)
    if own is None:
        torch.mm(x, weights[expert].t(), out=out)
    else:
        out.copy_(_multiply(x, own.forward, None))


def expert_product_back(dy: torch.Tensor, weights: torch.Tensor, expert: int, out: torch.Tensor) -> None:
    """out[N, in] = dy W_e."""
    own = packed(weights, expert)
    if own is None:
        torch.mm(dy, weights[expert], out=out)
    else:
        out.copy_(_multiply(dy, own.backward, None))


def _pack(weight: torch.Tensor) -> Packed:
    reorder = torch.ops.mkldnn._reorder_linear_weight
    return Packed(reorder(weight, _ROWS_HINT), reorder(weight.t().contiguous(), _ROWS_HINT))


def _multiply(x: torch.Tensor, layout: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    result: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, layout, bias, "none", [], "")
    return result
