"""A model built and filled weight by weight, each rank reading only what it keeps.

Knows Hugging Face classes, names of weights and which experts are wanted. Does not know how ranks talk or
what becomes of a weight once it is there (``place``: zero3 partitions it at once).
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from twinkle_serve.engine.sharding.families import Family, Part
from twinkle_serve.engine.sharding.files import WeightFiles
from twinkle_serve.engine.unsupported import UnsupportedModel

logger = logging.getLogger(__name__)
_REPORT_EVERY_S = 10.0

Place = Callable[[nn.Module, str, torch.Tensor], None]


def skeleton(model_config: Any, dtype: torch.dtype) -> PreTrainedModel:
    """The model without weights: its parameters are on the meta device, its buffers are real."""
    with _parameters_on_meta():
        model: PreTrainedModel = AutoModelForCausalLM.from_config(model_config, dtype=dtype)
    return model.requires_grad_(False).eval()


def keep_experts(model: PreTrainedModel, experts: range) -> int:
    """Let every module of fused experts have only ``experts``. Returns how many modules there are."""
    count = 0
    for module in model.modules():
        if is_fused_experts(module):
            for name in ("gate_up_proj", "down_proj"):
                whole = getattr(module, name)
                setattr(module, name, nn.Parameter(whole[: len(experts)], requires_grad=False))
            module.num_experts = len(experts)
            count += 1
    return count


def is_fused_experts(module: nn.Module) -> bool:
    gate_up = getattr(module, "gate_up_proj", None)
    return isinstance(gate_up, nn.Parameter) and len(whole_shape(gate_up)) == 3


def whole_shape(parameter: torch.Tensor) -> tuple[int, ...]:
    """The shape of a weight, also where this rank has a part of it that DeepSpeed keeps elsewhere."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def fill(
    model: PreTrainedModel, files: WeightFiles, family: Family, place: Place, first_expert: int = 0
) -> None:
    """Read every parameter and hand it to ``place(module, name, tensor)``, one at a time.

    Raises UnsupportedModel, naming the weight.
    """
    parameters = [(name, module, leaf) for name, module, leaf in _parameters(model)]
    started = told = time.monotonic()
    num_bytes = 0
    for index, (name, module, leaf) in enumerate(parameters):
        wanted: torch.Tensor = getattr(module, leaf)
        if is_fused_experts(module) and leaf in ("gate_up_proj", "down_proj"):
            tensor = _read_experts(name, wanted, files, family, first_expert)
        else:
            tensor = _read(family.in_files(name), wanted, files)
        num_bytes += tensor.nbytes
        place(module, leaf, tensor)
        if time.monotonic() - told > _REPORT_EVERY_S:
            told = time.monotonic()
            logger.info("read %d of %d weights, %.1f GB", index + 1, len(parameters), num_bytes / 1e9)
    model.tie_weights()
    seconds = time.monotonic() - started
    logger.info("read %d weights, %.2f GB in %.1f s", len(parameters), num_bytes / 1e9, seconds)


def _parameters(model: PreTrainedModel) -> Iterator[tuple[str, nn.Module, str]]:
    """(name, module, leaf) of every parameter, a tied one once."""
    for name, _ in list(model.named_parameters()):
        path, _, leaf = name.rpartition(".")
        yield name, model.get_submodule(path), leaf


def _read(name: str, wanted: torch.Tensor, files: WeightFiles) -> torch.Tensor:
    _check(name, tuple(wanted.shape), files)
    return files.read(name).to(wanted.dtype)


def _check(name: str, shape: tuple[int, ...], files: WeightFiles) -> None:
    if name not in files:
        raise UnsupportedModel(f"the weight files lack {name}; they are of another architecture")
    found = files.shape(name)
    if found != shape:
        raise UnsupportedModel(f"{name} has shape {list(found)}; config.json asks for {list(shape)}")


def _read_experts(
    name: str, wanted: torch.Tensor, files: WeightFiles, family: Family, first: int
) -> torch.Tensor:
    """The experts from ``first`` on, as many as ``wanted`` [E, out, in] has, fused."""
    block, _, leaf = name.rpartition(".")
    count = wanted.shape[0]
    if name in files:  # written fused
        total, *rest = files.shape(name)
        if tuple(rest) != tuple(wanted.shape[1:]) or total < first + count:
            raise UnsupportedModel(f"{name} has shape {[total, *rest]}, not {list(wanted.shape)}")
        return files.read(name, first, first + count).to(wanted.dtype)
    tensor = torch.empty(wanted.shape, dtype=wanted.dtype)
    parts: tuple[Part, ...] = ("gate", "up") if leaf == "gate_up_proj" else ("down",)
    height = wanted.shape[1] // len(parts)
    for expert in range(count):
        for index, part in enumerate(parts):
            key = f"{family.expert(block, first + expert, part)}.weight"
            _check(key, (height, wanted.shape[2]), files)
            tensor[expert, index * height : (index + 1) * height] = files.read(key)
    return tensor


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Parameters made inside have no storage; buffers, which no file holds, are made as ever."""
    original = nn.Module.register_parameter

    def register(module: nn.Module, name: str, param: nn.Parameter | None) -> None:
        if param is not None and param.device.type != "meta":
            param = nn.Parameter(param.to("meta"), requires_grad=False)
        original(module, name, param)

    nn.Module.register_parameter = register  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        nn.Module.register_parameter = original  # type: ignore[method-assign]
