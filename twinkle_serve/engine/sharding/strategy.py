"""How a base model lies on the ranks of a group: one interface, three ways.

Knows what each way does before, inside and after a pass, and how it loads a model. Does not know losses,
slots or samples: whoever runs a pass says only whose rows each rank has.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from twinkle_serve.config import ModelConfig
from twinkle_serve.engine.sharding.ranks import Ranks
from twinkle_serve.engine.slots import Adapter

Stretches = Sequence[tuple[Adapter | None, int]]
"""(adapter, number of rows), one after the other."""


class Sharding:
    """``single``: this process has the whole model. The other ways override what differs.

    splits_experts: a rank's model has a part of every layer's experts.
    """

    splits_experts = False

    def __init__(self, ranks: Ranks) -> None:
        self.ranks = ranks

    def load(
        self,
        config: ModelConfig,
        model_config: Any,
        directory: Path,
        device: torch.device,
        dtype: torch.dtype,
    ) -> PreTrainedModel:
        """The model with this rank's weights, frozen, before LoRA is put in.

        Raises UnsupportedModel, or OSError for files that are missing or damaged.
        """
        raise NotImplementedError

    def reference_logits(self, model: PreTrainedModel, token_ids: torch.Tensor) -> torch.Tensor:
        """Float32 logits [n, V] of one sequence as the model's own code computes them; all ranks call it."""
        with torch.no_grad():
            logits: torch.Tensor = model(input_ids=token_ids.unsqueeze(0), use_cache=False).logits[0].float()
        return logits

    def attach(self, model: nn.Module) -> None:
        """LoRA is in: hook what has to be hooked. Nothing is replaced in the model afterwards."""

    def enter(self, by_rank: Sequence[Stretches]) -> None:
        """A pass begins; every rank has at least one row."""

    def enter_backward(self) -> None:
        """Its backward begins."""

    def leave(self) -> None:
        """It is over on this rank, whatever became of it."""

    def complete(self) -> None:
        """This rank failed in the middle of the pass: do whatever keeps its peers from waiting for it.
        Raises RankLost if nothing can."""
