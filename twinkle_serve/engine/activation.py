"""The gated activation between an expert's projections, forward and backward.

Knows SiLU by heart and asks autograd about any other. Does not know experts or LoRA.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn


def activate(module: Any, gate_up: torch.Tensor) -> torch.Tensor:
    """act(gate) * up of ``gate_up`` [P, 2I], gate and up side by side: [P, I]."""
    gate, up = gate_up.chunk(2, dim=-1)
    return module.act_fn(gate) * up


def backward_activation(module: Any, gate_up: torch.Tensor, dz: torch.Tensor) -> torch.Tensor:
    """d(gate_up) from dz, through whatever activation the model has."""
    gate, up = gate_up.chunk(2, dim=-1)
    if isinstance(module.act_fn, nn.SiLU) or type(module.act_fn).__name__ == "SiLUActivation":
        dgate_up = torch.empty_like(gate_up)
        dgate, dup = dgate_up.chunk(2, dim=-1)
        torch.mul(dz, F.silu(gate), out=dup)
        dgate.copy_(torch.ops.aten.silu_backward(dz * up, gate))
        return dgate_up
    with torch.enable_grad():
        leaf = gate_up.detach().requires_grad_()
        (dgate_up,) = torch.autograd.grad(activate(module, leaf), leaf, dz)
    return dgate_up
