"""Model families: what a checkpoint calls the parts that a rank reads by themselves.

Knows names only. A family is here once its sharded logits were compared with Hugging Face's (the tests do).
Dense models need no entry: their checkpoints name every weight as the model does.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Family:
    """Experts ``gate``, ``up`` and ``down`` of a layer are ``{block}.{expert}.{name}.weight`` in the files.

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

    def expert(self, block: str, expert: int, projection: str) -> str:
        return f"{self.in_files(block)}.{expert}.{projection}.weight"


MIXTURES: dict[str, Family] = {
    "qwen3_moe": Family(),
    "mixtral": Family("w1", "w3", "w2", renamed=((".mlp.", ".block_sparse_moe."),)),
}
"""By ``model_type``: the mixtures of experts whose experts can be split over ranks."""

DENSE = Family()
