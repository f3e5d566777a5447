"""Attention over packed sequences: what the base model's attention modules call instead of their own.

Registered with transformers as the attention implementation ``twinkle``. Which rows attend to which is the
``Attend`` object in force, so training, prefill and decode share one model. Knows lengths; does not know
LoRA, tenants or where a KV cache keeps its blocks (kv_cache.py).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from inspect import signature
from itertools import accumulate, groupby
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AttentionInterface

IMPLEMENTATION = "twinkle"


class Attend(Protocol):
    """One way to attend. Shapes: query [1, Hq, T, D], key and value [1, Hkv, T, D] -> [1, T, Hq, D]."""

    def __call__(
        self,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scale: float | None,
        window: int | None,
    ) -> torch.Tensor: ...


class AttentionSwitch:
    """The ``Attend`` in force; one instance is shared by all attention modules of a model."""

    def __init__(self) -> None:
        self.attend: Attend | None = None


def attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    switch: AttentionSwitch = module.twinkle_attention  # type: ignore[assignment]
    assert switch.attend is not None, "the base model was called outside a pass"
    layer: int = module.layer_idx  # type: ignore[assignment]
    return switch.attend(layer, query, key, value, scaling, sliding_window), None


AttentionInterface.register(IMPLEMENTATION, attention_forward)


class PackedCausal:
    """Causal attention within each of the sequences that lie end to end.

    On a GPU one kernel does them all (``VARLEN``). Elsewhere neighbours of equal length go through one kernel
    call, so batches sorted by length are cheap.
    """

    def __init__(self, lengths: Sequence[int]) -> None:
        self._longest = max(lengths)
        self._ends = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)
        self._runs = [(length, len(list(group))) for length, group in groupby(lengths)]
        self._rows = [length * count for length, count in self._runs]

    def __call__(
        self,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scale: float | None,
        window: int | None,
    ) -> torch.Tensor:
        if VARLEN is not None and query.is_cuda and query.dtype != torch.float32:
            return self._varlen(query, key, value, scale, window)
        # One split is one backward node; slicing run by run would add a full-size zero tensor each.
        parts = zip(
            self._runs,
            query.split(self._rows, 2),
            key.split(self._rows, 2),
            value.split(self._rows, 2),
            strict=True,
        )
        outputs = [
            _equal_lengths(length, count, q, k, v, scale, window) for (length, count), q, k, v in parts
        ]
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, 1)

    def _varlen(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scale: float | None,
        window: int | None,
    ) -> torch.Tensor:
        assert VARLEN is not None
        if self._ends.device != query.device:
            self._ends = self._ends.to(query.device, non_blocking=True)
        q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
        left = -1 if window is None else window - 1
        return VARLEN(q, k, v, self._ends, self._longest, scale, left).unsqueeze(0)


def _varlen_kernel() -> Callable[..., torch.Tensor] | None:
    """torch's attention over sequences of any lengths, if this torch has it with windows (2.11 does)."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    parameters = signature(varlen_attn).parameters
    if "window_size" not in parameters or "scale" not in parameters:
        return None

    def run(
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        ends: torch.Tensor,
        longest: int,
        scale: float | None,
        left: int,
    ) -> torch.Tensor:
        """query [T, Hq, D], key and value [T, Hkv, D] -> [T, Hq, D]. left: how far back, -1 for all."""
        options: dict[str, Any] = {"scale": scale, "window_size": (left, 0)}
        if "enable_gqa" in parameters:
            options["enable_gqa"] = True
        elif query.shape[1] != key.shape[1]:
            groups = query.shape[1] // key.shape[1]
            key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
        found = varlen_attn(query, key, value, ends, ends, longest, longest, **options)
        assert isinstance(found, torch.Tensor)
        return found

    return run


VARLEN = _varlen_kernel()


def _equal_lengths(
    length: int,
    count: int,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scale: float | None,
    window: int | None,
) -> torch.Tensor:
    """``count`` sequences of ``length`` rows each: [1, H, count * length, D] -> [1, count * length, H, D]."""
    q, k, v = (x[0].unflatten(1, (count, length)).transpose(0, 1) for x in (query, key, value))
    mask = None if window is None or window >= length else window_mask(length, length, window, q.device)
    out = F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=mask is None, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
    )
    return out.transpose(1, 2).reshape(1, count * length, out.shape[1], out.shape[3])


def window_mask(rows: int, columns: int, window: int | None, device: torch.device) -> torch.Tensor:
    """True where the last ``rows`` of ``columns`` positions may look: causal, at most ``window`` back."""
    position = torch.arange(columns - rows, columns, device=device)[:, None]
    other = torch.arange(columns, device=device)[None, :]
    allowed = other <= position
    return allowed if window is None else allowed & (other > position - window)
