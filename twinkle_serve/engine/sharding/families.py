"""Model families: what files, those of base models and of adapters, call the experts of a mixture.

Knows names only. A family is here once its sharded logits were compared with Hugging Face's (the tests do).
Dense models need no entry: their checkpoints name every weight as the model does.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Part = Literal["gate", "up", "down"]


@dataclass(frozen=True, slots=True)
class Family:
    """The parts of a layer's experts are the modules ``{block}.{expert}.{name}`` in the files.

    renamed: parts of parameter names in the model, and what the files have in their place.
    """

    gate: str = "gate_proj"
    up: str = "up_proj"
    down: str = "down_proj"
    renamed: tuple[tuple[str, str], ...] = ()

    def in_files(self, name: str) -> str:
        for ours, theirs in self.renamed:
            name = name.replace(ours, theirs)
        return name

    def expert(self, block: str, expert: int, part: Part) -> str:
        """What the files call a part of an expert. block: the model's name of a layer's experts."""
        name = {"gate": self.gate, "up": self.up, "down": self.down}[part]
        return f"{self.in_files(block)}.{expert}.{name}"


MIXTURES: dict[str, Family] = {
    "qwen3_moe": Family(),
    "mixtral": Family("w1", "w3", "w2", renamed=((".mlp.", ".block_sparse_moe."),)),
}
"""By ``model_type``: the mixtures of experts whose experts can be split over ranks."""

DENSE = Family()


def family_of(model_type: str | None) -> Family:
    return MIXTURES.get(model_type or "", DENSE)
