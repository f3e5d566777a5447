"""How a base model lies on the ranks of a group: one interface, three ways.

Knows what each way does before, inside and after a pass, and how it loads a model. Does not know losses,
slots or samples: whoever runs a pass says only whose rows each rank has.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from twinkle_serve.config import ModelConfig
from twinkle_serve.engine.layers import Segments
from twinkle_serve.engine.sharding.ranks import RankLost, Ranks
from twinkle_serve.engine.slots import Adapter

logger = logging.getLogger(__name__)
T = TypeVar("T")

Stretches = Sequence[tuple[Adapter | None, int]]
"""(adapter, number of rows), one after the other."""


class Dispatch(Protocol):
    """Brings rows to the ranks that have their experts. segments: of the rows that come to this rank."""

    segments: Segments

    def __call__(
        self, module: nn.Module, hidden: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor: ...


class Sharding:
    """``single``: this process has the whole model. The other ways override what differs.

    splits_experts: a rank's model has a part of every layer's experts. dispatch: what then takes the experts'
    place in the model. partitions_weights: weights are there only while their layer runs.
    """

    splits_experts = False
    partitions_weights = False

    def __init__(self, ranks: Ranks) -> None:
        self.ranks = ranks
        self.dispatch: Dispatch | None = None

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
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
            directory, config=model_config, dtype=dtype
        )
        model.to(device).requires_grad_(False)
        return model.eval()

    def reference_logits(self, model: PreTrainedModel, token_ids: torch.Tensor) -> torch.Tensor:
        """Float32 logits [n, V] of one sequence as the model's own code computes them; all ranks call it."""
        with torch.no_grad():
            logits: torch.Tensor = model(input_ids=token_ids.unsqueeze(0), use_cache=False).logits[0].float()
        return logits

    def attach(self, model: PreTrainedModel, *, grouped: bool) -> None:
        """LoRA is in: hook what has to be hooked. Nothing is replaced in the model afterwards."""

    def enter(self, by_rank: Sequence[Stretches]) -> None:
        """A pass begins; every rank has at least one row."""

    def enter_backward(self) -> None:
        """Its backward begins."""

    def leave(self) -> None:
        """It is over on this rank, whatever became of it."""

    def rehearsed(self) -> None:
        """A first pass was made, with its backward; later ones make the same collectives."""

    def complete(self) -> None:
        """This rank failed in the middle of the pass: do whatever keeps its peers from waiting for it.
        Raises RankLost if nothing can."""

    def all_parts(self, compute: Callable[[], T]) -> list[T]:
        """What every rank's ``compute`` gives, by rank: the forward or the backward of the pass.

        If it raises on one rank, all raise PeerFailed; alone, what was raised. Raises RankLost.
        """
        if self.ranks.size == 1:
            return [compute()]
        result, error = None, None
        try:
            result = compute()
        except RankLost:
            raise
        except Exception as raised:
            logger.exception("rank %d failed in the middle of a pass", self.ranks.rank)
            error = raised
            self.complete()
        return self.ranks.exchange(result, error)
