"""RMS norms of a frozen base model with a backward of their own.

The norm's weight needs no gradient, so the whole backward is one short formula; autograd would keep and walk
eight steps per norm, which is most of what a small batch costs. Knows Llama's definition of the norm only.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable


class FrozenRMSNorm(nn.Module):
    """weight * x / rms(x) over the last dimension, computed in float32, in the type of x."""

    def __init__(self, weight: torch.Tensor, eps: float) -> None:
        super().__init__()
        self.weight = weight
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.is_cuda:  # there torch has one kernel for it, forward and backward
            return F.rms_norm(x, self.weight.shape, self.weight, self.eps)
        if not torch.is_grad_enabled():
            return self.weight * (x.float() * _scale(x.float(), self.eps)).to(x.dtype)
        result: torch.Tensor = _RMSNorm.apply(x, self.weight, self.eps)
        return result


def _scale(x: torch.Tensor, eps: float) -> torch.Tensor:
    """1 / rms of float32 rows: [..., 1]."""
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        x32 = x.float()
        scale = _scale(x32, eps)
        ctx.save_for_backward(x, weight, scale)
        return weight * (x32 * scale).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight, scale = ctx.saved_tensors
        normalized = x.float() * scale
        weighted = (dy * weight).float()
        along = (weighted * normalized).mean(-1, keepdim=True)
        return (weighted - normalized * along).mul_(scale).to(x.dtype), None, None


def replace_norms(model: nn.Module) -> int:
    """Replace every norm that is Llama's by name and shape; returns how many there were."""
    count = 0
    for name, module in list(model.named_modules()):
        eps = getattr(module, "variance_epsilon", None)
        if type(module).__name__.endswith("RMSNorm") and isinstance(eps, float):
            parent, _, leaf = name.rpartition(".")
            weight = module.weight
            assert isinstance(weight, torch.Tensor)
            setattr(model.get_submodule(parent), leaf, FrozenRMSNorm(weight, eps))
            count += 1
    return count
