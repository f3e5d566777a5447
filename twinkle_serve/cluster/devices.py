"""On what each base model of a deployment computes, where its configuration leaves that open.

Knows how many GPUs there are and how many ranks want one. Does not know Ray, nodes or memory.
"""

from __future__ import annotations

from collections.abc import Iterable

from twinkle_serve.config import ModelConfig


def devices(models: Iterable[ModelConfig], num_gpus: int) -> dict[str, str]:
    """By the model's name, "cpu" or "cuda". ``device: cuda`` has its GPUs first, then ``auto`` in the order
    of the models. All groups of a model are alike: where only some have GPUs, the others wait for theirs."""
    models = list(models)
    chosen: dict[str, str] = {model.name: model.device for model in models}
    free = num_gpus - sum(model.ranks * model.groups for model in models if model.device == "cuda")
    for model in models:
        if model.device == "auto":
            chosen[model.name] = "cuda" if free >= model.ranks else "cpu"
            if free >= model.ranks:
                free -= model.ranks * model.groups
    return chosen
