"""An adapter's block in the layout of the hosted service, which the cookbook's ``weights`` tools convert.

Knows its key names: experts as one tensor a projection, ``w1`` (gate), ``w3`` (up) and ``w2`` (down), the
experts first and a shared factor once; the unembedding as ``unembed_tokens``. Does not know PEFT's layout
(peft_format.py), which repeats what experts share.
"""

from __future__ import annotations

import torch

from twinkle_serve.engine.layout import AdapterLayout, Target
from twinkle_serve.engine.slots import trained_groups
from twinkle_serve.protocol.data import LoraSpec

_PREFIX = "base_model.model."
_EXPERT_NAMES = {"expert_gate": "w1", "expert_up": "w3", "expert_down": "w2"}


def export_tinker(layout: AdapterLayout, block: torch.Tensor, spec: LoraSpec) -> dict[str, torch.Tensor]:
    """What ``adapter_model.safetensors`` holds for a block ``[rank, row_size]``: of a linear layer
    A ``[r, in]`` and B ``[out, r]``, of experts A ``[experts or 1, r, in]`` and B alike."""
    tensors: dict[str, torch.Tensor] = {}
    groups = trained_groups(spec)
    for target in layout.targets:
        if target.group not in groups:
            continue
        rows = layout.a(block, target), layout.b_t(block, target)
        a = rows[0].reshape(spec.rank, -1, target.in_features).transpose(0, 1)
        b = rows[1].reshape(spec.rank, -1, target.out_features).permute(1, 2, 0)
        if target.kind == "linear":
            a, b = a[0], b[0]
        name = _name(target)
        tensors[f"{name}.lora_A.weight"] = a.clone(memory_format=torch.contiguous_format)
        tensors[f"{name}.lora_B.weight"] = b.clone(memory_format=torch.contiguous_format)
    return tensors


def _name(target: Target) -> str:
    if target.group == "unembed":
        return f"{_PREFIX}model.unembed_tokens"
    if target.kind == "linear":
        return _PREFIX + target.path
    return f"{_PREFIX}{target.path}.{_EXPERT_NAMES[target.kind]}"
