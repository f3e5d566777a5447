"""What this rank's memory is used for, counted from the tensors themselves.

Knows every place where the engine keeps large tensors. Does not know the allocator's overhead, the process's
other memory, or other ranks; ``activations`` can be told only where the device counts its peak.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

import torch

from twinkle_serve.engine.adapter_pool import AdapterPool
from twinkle_serve.engine.base_model import BaseModel
from twinkle_serve.engine.frozen import packed_bytes
from twinkle_serve.engine.kv_cache import KVCache
from twinkle_serve.engine.slots import SlotPool


def weights_of(base: BaseModel) -> dict[str, int]:
    """Bytes of the frozen weights, which stay as they were loaded. experts: those in ``base`` that belong to
    fused experts. packed: weights in a second layout."""
    expert_ids = {id(parameter) for parameter in _expert_parameters(base)}
    parameters = list(base.model.parameters())
    return {
        "base": sum(map(_kept_bytes, parameters)),
        "experts": sum(_kept_bytes(p) for p in parameters if id(p) in expert_ids),
        "packed": sum(map(packed_bytes, parameters)),
    }


def memory_of(
    weights: Mapping[str, int],
    device: torch.device,
    slots: SlotPool,
    adapters: AdapterPool,
    cache: KVCache,
) -> dict[str, int]:
    """Bytes on the device by use; each tick reports them, so this walks through no model.

    weights: see ``weights_of``. slots: weights of training runs; gradients and moments are theirs.
    activations: a GPU's highest use so far beyond the rest.
    """
    found = dict(weights) | {
        "slots": slots.weight_bytes,
        "gradients": slots.grads.nbytes,
        "moments": slots.exp_avg.nbytes + slots.exp_avg_sq.nbytes,
        "sampling_adapters": adapters.num_bytes,
        "kv": _sum_bytes([*cache.keys, *cache.values]),
    }
    if device.type == "cuda":
        rest = sum(found.values()) - found["experts"]
        found["activations"] = max(0, torch.cuda.max_memory_allocated(device) - rest)
    return found


def _expert_parameters(base: BaseModel) -> Iterator[torch.Tensor]:
    for module in base.model.modules():
        if hasattr(module, "twinkle_targets"):
            yield from module.parameters()


def _kept_bytes(parameter: torch.Tensor) -> int:
    """Under zero3 a weight is a part that DeepSpeed keeps beside the empty parameter."""
    part: torch.Tensor = getattr(parameter, "ds_tensor", parameter)
    return part.nbytes


def _sum_bytes(tensors: Iterable[torch.Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors)
