"""Attention windows: whether what a layer passes to the attention function is what its mask would do.

No masks are made in a pass (attention.py), so a window that is only in one would be silently left out. Knows
what transformers puts into masks and what layers pass. Does not know how attention is computed.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from twinkle_serve.engine import attention
from twinkle_serve.engine.unsupported import UnsupportedModel

_IMPLEMENTATION = "twinkle_windows"


@contextmanager
def compare_windows(model: PreTrainedModel, max_context_length: int) -> Iterator[None]:
    """A pass in here also makes masks, and raises UnsupportedModel if a layer has a mask of its own, or a
    window that is not the mask's. Windows that no sequence reaches do not matter."""
    found: list[int] = []
    for module in model.modules():
        if hasattr(module, "twinkle_attention"):
            module.twinkle_windows = found
    model.set_attn_implementation(_IMPLEMENTATION)
    try:
        yield
    finally:
        model.set_attn_implementation(attention.IMPLEMENTATION)
    shortest = min(found, default=max_context_length)
    if shortest < max_context_length:
        raise UnsupportedModel(
            f"{type(model).__name__}: layers have an attention window ({shortest}) only in their mask, or "
            f"only beside it; beyond it this is not served: set max_context_length to at most {shortest}"
        )


def _mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    device: torch.device,
    local_size: int | None = None,
    **_: Any,
) -> torch.Tensor:
    """Of the shape that models expect. What counts is the window that it carries."""
    mask = torch.ones(batch_size, 1, q_length, kv_length, dtype=torch.bool, device=device)
    mask.twinkle_window = local_size  # type: ignore[attr-defined]
    return mask


def _forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **rest: Any,
) -> tuple[torch.Tensor, None]:
    if attention_mask is not None and not hasattr(attention_mask, "twinkle_window"):
        raise UnsupportedModel(
            f"{type(module).__name__} makes an attention mask of its own; that is not served"
        )
    window = getattr(attention_mask, "twinkle_window", None)
    if window != sliding_window:
        found: list[int] = module.twinkle_windows  # type: ignore[assignment]
        found += [size for size in (window, sliding_window) if size]
    return attention.attention_forward(
        module, query, key, value, None, scaling=scaling, sliding_window=sliding_window, **rest
    )


AttentionInterface.register(_IMPLEMENTATION, _forward)
AttentionMaskInterface.register(_IMPLEMENTATION, _mask)
