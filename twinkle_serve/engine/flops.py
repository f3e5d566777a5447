"""How much arithmetic one token takes in a base model, and how much a device can do: what MFU is made of.

Knows Hugging Face configurations and torch devices. Loads no weights. Does not know adapters, whose products
are a small part of the work, nor attention scores, whose share grows with the length of a sequence.
"""

from __future__ import annotations

import time
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from twinkle_serve.protocol.work import ModelInfo

# Dense bfloat16 peaks from the makers' data sheets, operations a second; the first name that fits counts.
_PEAKS = (
    ("B200", 2250e12),
    ("H200", 989e12),
    ("H20", 148e12),
    ("H100 PCIe", 756e12),
    ("H100", 989e12),
    ("H800", 989e12),
    ("A100", 312e12),
    ("A800", 312e12),
    ("L40S", 362e12),
    ("A10", 125e12),
)
_PROBE_SIZE = 512
_PROBES = 3


@lru_cache(maxsize=8)
def with_speed(info: ModelInfo, directory: Path, device: torch.device, dtype: torch.dtype) -> ModelInfo:
    """``info`` with what it takes to say how well the device is used. The first call takes a moment."""
    return replace(info, active_parameters=active_parameters(directory), peak_flops=peak_flops(device, dtype))


def active_parameters(directory: Path) -> int:
    """Weights that one token is multiplied with: of a mixture's experts only those that answer."""
    config = AutoConfig.from_pretrained(directory)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    model.tie_weights()
    share = _share_of_experts(config)
    total = 0.0
    for name, parameter in model.named_parameters():
        if parameter.dim() >= 2:
            total += parameter.numel() * (share if ".experts." in name else 1.0)
    embeddings, head = model.get_input_embeddings(), model.get_output_embeddings()
    if head is not None and head.weight is not embeddings.weight:
        total -= embeddings.weight.numel()  # looked up, not multiplied with
    return round(total)


def peak_flops(device: torch.device, dtype: torch.dtype) -> float:
    """Operations a second. From the data sheet for a known GPU in bfloat16; otherwise what a product of two
    square matrices reaches now."""
    if device.type == "cuda" and dtype is torch.bfloat16:
        name = torch.cuda.get_device_name(device)
        for known, peak in _PEAKS:
            if known in name:
                return peak
    return _measured(device, dtype)


def _share_of_experts(config: object) -> float:
    experts = getattr(config, "num_experts", None) or getattr(config, "num_local_experts", None)
    answering = getattr(config, "num_experts_per_tok", None)
    return answering / experts if experts and answering else 1.0


def _measured(device: torch.device, dtype: torch.dtype) -> float:
    a = torch.ones(_PROBE_SIZE, _PROBE_SIZE, device=device, dtype=dtype)
    best = float("inf")
    for _ in range(_PROBES):
        _wait(device)
        begin = time.perf_counter()
        torch.mm(a, a)
        _wait(device)
        best = min(best, time.perf_counter() - begin)
    return 2 * _PROBE_SIZE**3 / best


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
