"""Model families: what files, those of base models and of adapters, call the experts of a mixture.

Knows names only. A family is here once its adapters were compared with PEFT's (the tests do); those not here
are refused. Dense models need no entry: their checkpoints name every weight as the model does.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Part = Literal["gate", "up", "down"]


@dataclass(frozen=True, slots=True)
class Family:
    """The parts of a layer's experts are the modules ``{block}.{expert}.{name}`` in the files.

    renamed: parts of parameter names in the model, and what the files have in their place.
    is_wrapped: PEFT reads no adapters of single experts of this family, only ones of their fused parameters.
    """

    gate: str = "gate_proj"
    up: str = "up_proj"
    down: str = "down_proj"
    renamed: tuple[tuple[str, str], ...] = ()
    is_wrapped: bool = False

    def in_files(self, name: str) -> str:
        for ours, theirs in self.renamed:
            name = name.replace(ours, theirs)
        return name

    def expert(self, block: str, expert: int, part: Part) -> str:
        """What the files call a part of an expert. block: the model's name of a layer's experts."""
        name = {"gate": self.gate, "up": self.up, "down": self.down}[part]
        return f"{self.in_files(block)}.{expert}.{name}"


_MIXTRAL_BLOCK = ((".mlp.", ".block_sparse_moe."),)
MIXTURES: dict[str, Family] = {
    "qwen3_moe": Family(),
    "mixtral": Family("w1", "w3", "w2", renamed=_MIXTRAL_BLOCK),
    "olmoe": Family(),
    "qwen2_moe": Family(is_wrapped=True),
    "glm4_moe": Family(),
    "phimoe": Family("w1", "w3", "w2", renamed=_MIXTRAL_BLOCK, is_wrapped=True),
}
"""The mixtures of experts that are served, by ``model_type``."""

SPLIT = ("qwen3_moe", "mixtral")
"""Those whose sharded logits were compared with Hugging Face's too: they can be spread over ranks."""

DENSE = Family()

SERVED = (
    "served are dense models with separate q, k, v, o, gate, up and down projections, such as Llama, "
    f"Mistral, Qwen2 and Qwen3, and the mixtures {', '.join(sorted(MIXTURES))}; "
    f"over several ranks, of mixtures, {' and '.join(SPLIT)}"
)
"""How a refusal of an architecture ends."""


def family_of(model_type: str | None) -> Family:
    return MIXTURES.get(model_type or "", DENSE)
