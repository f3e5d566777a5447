"""ZeRO-3 as a way to load and to run a model: each rank keeps a part of every weight of the decoder layers.

DeepSpeed's hooks gather a layer's weights before it runs, forward and backward, and let them go afterwards.
Knows no DeepSpeed optimizer or engine. Embeddings, last norm and unembedding stay whole on every rank:
they are used outside the layers. Imports DeepSpeed, which takes seconds, only when a model is loaded.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from twinkle_serve.config import ModelConfig
from twinkle_serve.engine.layers import LoraLinear
from twinkle_serve.engine.sharding.families import SERVED, SPLIT, family_of
from twinkle_serve.engine.sharding.files import WeightFiles
from twinkle_serve.engine.sharding.loading import fill, is_fused_experts, skeleton
from twinkle_serve.engine.sharding.ranks import RankLost, Ranks
from twinkle_serve.engine.sharding.strategy import Sharding, Stretches
from twinkle_serve.engine.unsupported import UnsupportedModel

logger = logging.getLogger(__name__)


class Zero3(Sharding):
    """Weights of the layers in parts; adapters are replicated, and each rank has its own sequences."""

    partitions_weights = True

    def __init__(self, ranks: Ranks, device: torch.device) -> None:
        super().__init__(ranks)
        self._deepspeed = _import_deepspeed(device)
        self._config = {
            "train_micro_batch_size_per_gpu": 1,
            # The memory-efficient linear would replace torch's for the whole process.
            "zero_optimization": {"stage": 3, "memory_efficient_linear": False},
        }
        self._offload: Any = None
        self._is_forward = self._is_through = False

    def load(
        self,
        config: ModelConfig,
        model_config: Any,
        directory: Path,
        device: torch.device,
        dtype: torch.dtype,
    ) -> PreTrainedModel:
        logger.warning(
            "%s: sampling gathers every weight for each token under zero3; it is slow", config.name
        )
        model = skeleton(model_config, dtype)
        family = family_of(model_config.model_type)
        if model_config.model_type not in SPLIT and any(is_fused_experts(m) for m in model.modules()):
            raise UnsupportedModel(
                f"{directory} is a {model_config.model_type}, a mixture that cannot be split here; {SERVED}"
            )
        files = WeightFiles(directory)
        inside = {id(module) for module in _layers(model).modules()}
        partition = self._deepspeed.zero.Init(config_dict_or_path=self._config, dtype=dtype, enabled=True)

        def place(module: nn.Module, name: str, tensor: torch.Tensor) -> None:
            parameter = nn.Parameter(tensor.to(device), requires_grad=False)
            setattr(module, name, parameter)
            if id(module) in inside:
                # Reads are of whole tensors, one at a time; all but this rank's part is let go at once.
                partition._convert_to_deepspeed_param(parameter)
                parameter.partition()  # type: ignore[attr-defined]

        fill(model, files, family, place)
        return model.to(device)

    def reference_logits(self, model: PreTrainedModel, token_ids: torch.Tensor) -> torch.Tensor:
        """Layer by layer with the whole layer at hand: none of the hooks that passes rely on."""
        with _whole_layers(model, self._deepspeed):
            return super().reference_logits(model, token_ids)

    def attach(self, model: PreTrainedModel, *, grouped: bool) -> None:
        from deepspeed.runtime.zero.parameter_offload import DeepSpeedZeRoOffload

        layers = _layers(model)
        leaves = {type(module) for module in layers.modules() if is_leaf(module)}
        # Their inner modules are not called, or as often as data wants; ranks would gather differently.
        self._deepspeed.utils.set_z3_leaf_modules(layers, list(leaves))
        self._offload = DeepSpeedZeRoOffload(layers, timers=None, ds_config=self._config)
        layers[-1].register_forward_hook(self._came_through)

    def _came_through(self, *_: Any) -> None:
        self._is_through = self._is_forward  # checkpointing computes layers again in the backward pass

    def enter(self, by_rank: Sequence[Stretches]) -> None:
        # The list of layers is never called itself, which is when DeepSpeed would do this.
        self._offload.get_param_coordinator().reset_step()
        self._is_forward, self._is_through = True, False

    def enter_backward(self) -> None:
        self._is_forward = self._is_through = False

    def leave(self) -> None:
        self._offload.release_backward_leftovers()

    def complete(self) -> None:
        if not self._is_through:  # else nothing that fails, a loss for example, keeps anybody waiting
            raise RankLost("a rank failed in the middle of a pass, and zero3 cannot go on without it")


def is_leaf(module: nn.Module) -> bool:
    return isinstance(module, LoraLinear) or hasattr(module, "twinkle_targets")


def _layers(model: PreTrainedModel) -> nn.ModuleList:
    layers = getattr(model.base_model, "layers", None)
    if not isinstance(layers, nn.ModuleList):
        raise UnsupportedModel(f"{type(model).__name__} has no list of decoder layers; {SERVED}")
    return layers


@contextmanager
def _whole_layers(model: PreTrainedModel, deepspeed: Any) -> Iterator[None]:
    """Each layer gathers all of its weights as it begins and lets them go as it ends."""
    hooks = []
    for layer in _layers(model):
        gathered = deepspeed.zero.GatheredParameters(list(layer.parameters()))
        hooks.append(layer.register_forward_pre_hook(lambda *_, context=gathered: context.__enter__()))
        hooks.append(layer.register_forward_hook(lambda *_, context=gathered: context.__exit__()))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _import_deepspeed(device: torch.device) -> Any:
    """DeepSpeed, talking through the group of ranks that is there already."""
    os.environ.setdefault("DS_ACCELERATOR", device.type)
    os.environ.setdefault("LOCAL_RANK", str(device.index or 0))
    try:
        import deepspeed
        import deepspeed.ops
    except ImportError:
        raise UnsupportedModel(
            "sharding: zero3 needs DeepSpeed: pip install twinkle-serve[sharding]"
        ) from None
    # Otherwise more than a minute is spent compiling collectives in shared memory that are not used.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_backend="nccl" if device.type == "cuda" else "gloo", verbose=False)
    return deepspeed
