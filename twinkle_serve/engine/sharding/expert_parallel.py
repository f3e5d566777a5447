"""Expert parallelism as a way to load and to run a model: each rank keeps its experts and all of the rest.

Knows which weights a rank reads and how to check them. Does not know how rows come to experts (dispatch.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from twinkle_serve.config import ModelConfig
from twinkle_serve.engine.sharding.all_to_all import AllToAllDispatch
from twinkle_serve.engine.sharding.dispatch import ExpertDispatch, local_index
from twinkle_serve.engine.sharding.families import SERVED, SPLIT, family_of
from twinkle_serve.engine.sharding.files import WeightFiles
from twinkle_serve.engine.sharding.loading import fill, is_fused_experts, keep_experts, skeleton
from twinkle_serve.engine.sharding.ranks import Ranks
from twinkle_serve.engine.sharding.strategy import Sharding, Stretches
from twinkle_serve.engine.unsupported import UnsupportedModel


class ExpertParallel(Sharding):
    """Experts split over the ranks; attention, norms, embeddings and the unembedding on each of them."""

    splits_experts = True

    def __init__(self, ranks: Ranks, device: torch.device, config: ModelConfig) -> None:
        super().__init__(ranks)
        make = AllToAllDispatch if config.expert_dispatch == "all_to_all" else ExpertDispatch
        self.dispatch: ExpertDispatch | AllToAllDispatch = make(ranks, device)

    def load(
        self,
        config: ModelConfig,
        model_config: Any,
        directory: Path,
        device: torch.device,
        dtype: torch.dtype,
    ) -> PreTrainedModel:
        if model_config.model_type not in SPLIT:
            raise UnsupportedModel(
                f"{directory} is a {model_config.model_type}; sharding: expert_parallel serves "
                f"{' and '.join(SPLIT)}, and sharding: zero3 these and dense models. In all, {SERVED}"
            )
        family = family_of(model_config.model_type)
        model = skeleton(model_config, dtype)
        first = self._keep_share(model, directory)

        def place(module: nn.Module, name: str, tensor: torch.Tensor) -> None:
            setattr(module, name, nn.Parameter(tensor.to(device), requires_grad=False))

        fill(model, WeightFiles(directory), family, place, first)
        return model.to(device)

    def _keep_share(self, model: PreTrainedModel, directory: Path) -> int:
        """Leave this rank's experts in the skeleton; returns the first of them."""
        totals = {int(m.num_experts) for m in model.modules() if is_fused_experts(m)}
        size = self.ranks.size
        if len(totals) != 1 or min(totals) % size:
            raise UnsupportedModel(
                f"{directory} has {sorted(totals)} experts a layer; {size} ranks cannot share them evenly"
            )
        count = totals.pop() // size
        keep_experts(model, range(self.ranks.rank * count, (self.ranks.rank + 1) * count))
        return self.ranks.rank * count

    def reference_logits(self, model: PreTrainedModel, token_ids: torch.Tensor) -> torch.Tensor:
        """The experts as Hugging Face computes them one by one; sums over ranks where ours gathers rows."""
        modules = [module for module in model.modules() if is_fused_experts(module)]
        chosen = model.config._experts_implementation
        model.config._experts_implementation = "eager"
        for module in modules:
            module.forward = partial(self._plain_experts, module, module.forward)
        try:
            return super().reference_logits(model, token_ids)
        finally:
            model.config._experts_implementation = chosen
            for module in modules:
                del module.forward

    def _plain_experts(
        self,
        module: nn.Module,
        forward: Any,
        hidden: torch.Tensor,
        index: torch.Tensor,
        weights: torch.Tensor,
    ) -> torch.Tensor:
        out = forward(hidden, local_index(index, self.ranks.rank, module), weights).contiguous()
        self.ranks.sum_(out)
        return out

    def attach(self, model: PreTrainedModel, *, grouped: bool) -> None:
        self.dispatch.segments.grouped = grouped

    def enter(self, by_rank: Sequence[Stretches]) -> None:
        self.dispatch.enter(by_rank)

    def enter_backward(self) -> None:
        self.dispatch.enter_backward()

    def rehearsed(self) -> None:
        self.dispatch.rehearsed()

    def complete(self) -> None:
        self.dispatch.complete()
