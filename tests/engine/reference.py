"""Independent computations to hold the engine against: Hugging Face, plain autograd, spelled-out losses.

Knows an adapter only as the PEFT tensors that a checkpoint holds. Uses nothing of the engine.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from twinkle_serve.protocol.data import DatumBatch

ALPHA = 32
_PREFIX = "base_model.model."
_EXPERT = re.compile(r"(.*\.experts)\.(\d+)\.(gate|up|down)_proj\.lora_([AB])\.weight")

Tensors = Mapping[str, torch.Tensor]


@cache
def load_model(directory: Path) -> PreTrainedModel:
    """The model as Hugging Face computes it, in the plainest way that it offers."""
    return AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, attn_implementation="eager", experts_implementation="eager"
    ).eval()


class DenseAdapter:
    """A model whose adapted weights are spelled out as W + (alpha / r) B A, differentiable by the factors.

    ``factors``: leaves by PEFT key. Of a factor that experts share there is one leaf, under expert 0's key.
    """

    def __init__(self, model: PreTrainedModel, tensors: Tensors) -> None:
        self._model = model
        self._ties = {key: _canonical(key) for key in tensors}
        for key, first in self._ties.items():
            assert torch.equal(tensors[key], tensors[first])
        self.factors = {key: tensors[key].clone().requires_grad_() for key in set(self._ties.values())}
        # In the order of the checkpoint, which is the same every time.
        self.factors = {key: self.factors[key] for key in tensors if key in self.factors}

    def spread(self, tensors: Mapping[str, torch.Tensor | None]) -> dict[str, torch.Tensor]:
        """Values by factor as values by checkpoint key: shared ones repeated, absent ones zero."""
        found = {key: tensors[first] for key, first in self._ties.items()}
        return {
            k: torch.zeros_like(self.factors[self._ties[k]]) if v is None else v for k, v in found.items()
        }

    def gradients(self) -> dict[str, torch.Tensor]:
        return self.spread({key: factor.grad for key, factor in self.factors.items()})

    def logits(self, tokens: torch.Tensor) -> torch.Tensor:
        """[N, V] for one sequence of int64 [N]."""
        return torch.func.functional_call(
            self._model, self._weights(), args=(tokens[None],), tie_weights=False
        ).logits[0]

    def _weights(self) -> dict[str, torch.Tensor]:
        weights: dict[str, torch.Tensor] = {}
        experts: dict[str, dict[str, dict[int, torch.Tensor]]] = {}
        for key in self._ties:
            if ".lora_A." not in key:
                continue
            a = self.factors[self._ties[key]]
            b = self.factors[self._ties[key.replace(".lora_A.", ".lora_B.")]]
            delta = (ALPHA / a.shape[0]) * b @ a
            match = _EXPERT.fullmatch(key)
            if match is None:
                name = key.removeprefix(_PREFIX).replace(".lora_A.weight", ".weight")
                weights[name] = self._base(name) + delta
            else:
                path, expert, projection, _ = match.groups()
                path = path.removeprefix(_PREFIX)
                experts.setdefault(path, {}).setdefault(projection, {})[int(expert)] = delta
        for path, deltas in experts.items():
            gate, up, down = (_stacked(deltas[name]) for name in ("gate", "up", "down"))
            weights[f"{path}.gate_up_proj"] = self._base(f"{path}.gate_up_proj") + torch.cat([gate, up], 1)
            weights[f"{path}.down_proj"] = self._base(f"{path}.down_proj") + down
        return weights

    def _base(self, name: str) -> torch.Tensor:
        return self._model.get_parameter(name).detach()


def _canonical(key: str) -> str:
    """The key that holds a factor's one value: hidden-side factors of experts are those of expert 0."""
    match = _EXPERT.fullmatch(key)
    if match is None:
        return key
    path, _, projection, factor = match.groups()
    shared = (projection == "down") == (factor == "B")
    return f"{path}.0.{projection}_proj.lora_{factor}.weight" if shared else key


def _stacked(by_expert: dict[int, torch.Tensor]) -> torch.Tensor:
    return torch.stack([by_expert[expert] for expert in range(len(by_expert))])


Logits = Callable[[torch.Tensor], torch.Tensor]


def plain(model: PreTrainedModel) -> Logits:
    return lambda tokens: model(tokens[None]).logits[0]


def datums(batch: DatumBatch) -> list[tuple[torch.Tensor, dict[str, torch.Tensor]]]:
    """Each datum's tokens [N] and columns, [N] or [N, K]."""
    found = []
    for index, length in enumerate(batch.lengths):
        one = batch.select([index])
        columns = {}
        for name, column in one.columns.items():
            shape = (length, column.widths[0]) if column.widths[0] else (length,)
            columns[name] = torch.from_numpy(np.array(column.values)).reshape(*shape)
        found.append((torch.from_numpy(one.tokens.astype(np.int64)), columns))
    return found


def target_logprobs(logits: Logits, batch: DatumBatch) -> list[torch.Tensor]:
    """Per datum the logprobs of its targets, shaped like them, by a full log-softmax."""
    found = []
    for tokens, columns in datums(batch):
        targets = columns["target_tokens"]
        matrix = targets if targets.dim() == 2 else targets[:, None]
        found.append(torch.log_softmax(logits(tokens), -1).gather(1, matrix).view(targets.shape))
    return found


def loss(
    name: str, logprobs: list[torch.Tensor], batch: DatumBatch, config: Mapping[str, Any]
) -> torch.Tensor:
    """The loss of a whole request as its documentation says it, datum by datum."""
    terms = []
    for lp, (_, columns) in zip(logprobs, datums(batch), strict=True):
        terms.append(_LOSSES[name](lp, columns, config))
    return torch.stack(terms).sum()


def _cross_entropy(lp: torch.Tensor, c: Tensors, config: Mapping[str, Any]) -> torch.Tensor:
    return -(lp * c["weights"]).sum() if "weights" in c else -lp.sum()


def _importance_sampling(lp: torch.Tensor, c: Tensors, config: Mapping[str, Any]) -> torch.Tensor:
    return -(torch.exp(lp - c["logprobs"]) * c["advantages"]).sum()


def _ppo(lp: torch.Tensor, c: Tensors, config: Mapping[str, Any]) -> torch.Tensor:
    ratio = torch.exp(lp - c["logprobs"])
    low, high = config.get("clip_low_threshold", 0.8), config.get("clip_high_threshold", 1.2)
    a = c["advantages"]
    return -torch.minimum(ratio * a, ratio.clamp(low, high) * a).sum()


def _cispo(lp: torch.Tensor, c: Tensors, config: Mapping[str, Any]) -> torch.Tensor:
    ratio = torch.exp(lp - c["logprobs"]).detach()
    low, high = config.get("clip_low_threshold", 0.0), config.get("clip_high_threshold", 4.0)
    return -(ratio.clamp(low, high) * lp * c["advantages"]).sum()


def _dro(lp: torch.Tensor, c: Tensors, config: Mapping[str, Any]) -> torch.Tensor:
    quadratic = (lp - c["logprobs"]) ** 2
    return -(lp * c["advantages"] - 0.5 * config.get("beta", 0.05) * quadratic).sum()


def _gspo(lp: torch.Tensor, c: Tensors, config: Mapping[str, Any]) -> torch.Tensor:
    mean = (lp - c["logprobs"]).mean().detach()
    ratio = torch.exp(mean + lp - lp.detach())
    low, high = config.get("clip_low_threshold", 0.8), config.get("clip_high_threshold", 1.2)
    a = c["advantages"]
    return -torch.minimum(ratio * a, ratio.clamp(low, high) * a).sum()


_LOSSES: dict[str, Callable[[torch.Tensor, Tensors, Mapping[str, Any]], torch.Tensor]] = {
    "cross_entropy": _cross_entropy,
    "importance_sampling": _importance_sampling,
    "ppo": _ppo,
    "cispo": _cispo,
    "dro": _dro,
    "gspo": _gspo,
}
