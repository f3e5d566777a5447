"""An adapter's block as the content of a PEFT directory, and back, bit for bit.

Knows PEFT's key names and configuration. Experts are written one by one, named as in the base model's files,
as PEFT, vLLM and the tinker cookbook expect: the factor that a layer's experts share is repeated for each.
Where PEFT would not read them so they are written fused (peft_fused.py). Does not know files or checkpoints
(adapter_files.py) or the optimizer's moments, which PEFT has no place for.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import torch

from twinkle_serve.engine import peft_fused
from twinkle_serve.engine.layout import AdapterLayout, Group, Kind, Target
from twinkle_serve.engine.sharding.families import DENSE, Family, Part
from twinkle_serve.engine.slots import LORA_ALPHA, trained_groups
from twinkle_serve.protocol.data import LoraSpec
from twinkle_serve.protocol.errors import UserError

MAX_RANK = 32
_PREFIX = "base_model.model."
_EXPERT_PARTS: dict[Kind, Part] = {"expert_gate": "gate", "expert_up": "up", "expert_down": "down"}
_ALL_GROUPS: tuple[Group, ...] = ("attn", "mlp", "unembed")
_MUST_BE_OFF = ("modules_to_save", "use_rslora", "use_dora")
PLACEMENT = ("target_parameters", "rank_pattern", "alpha_pattern")
"""Settings that PEFT needs for some mixtures."""


def export_peft(
    layout: AdapterLayout, block: torch.Tensor, spec: LoraSpec, base_model: str, alpha: int = LORA_ALPHA
) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """What ``adapter_config.json`` and ``adapter_model.safetensors`` hold for a block ``[rank, row_size]``.

    Only what the run trains is written. The tensors are contiguous float32 copies; none share memory.
    """
    groups = trained_groups(spec)
    wrapped = layout.family.is_wrapped
    tensors = {
        slot.key: slot.read(layout, block)
        for slot in _tensors(layout, groups)
        if not (wrapped and slot.target.num_experts)
    }
    if wrapped and "mlp" in groups:
        tensors |= peft_fused.fused(layout, block, _PREFIX)
    trained = [
        _module_name(layout.family, target)
        for target in layout.targets
        if target.group in groups and not (wrapped and target.num_experts)
    ]
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "inference_mode": True,
        "r": spec.rank,
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "target_modules": sorted({name.rsplit(".", 1)[-1] for name in trained}),
        "modules_to_save": None,
        "use_rslora": False,
        "use_dora": False,
    }
    return config | _placement(layout, groups, spec.rank, alpha), tensors


def _placement(layout: AdapterLayout, groups: Iterable[Group], rank: int, alpha: int) -> dict[str, Any]:
    """Where PEFT has to look for LoRA beside modules; nothing where all that is trained are modules."""
    if "mlp" not in groups or not any(target.num_experts for target in layout.targets):
        return {}
    if layout.family.is_wrapped:
        return peft_fused.placement(rank, alpha)
    # PEFT takes every gate_proj, up_proj and down_proj of such a model to be the experts', and drops what an
    # adapter has for dense layers and shared experts, unless their weights are named.
    linear = [t.path for t in layout.targets if t.kind == "linear" and t.group == "mlp"]
    return {"target_parameters": sorted(f"{path}.weight" for path in linear)} if linear else {}


def import_peft(
    layout: AdapterLayout, config: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]
) -> tuple[torch.Tensor, LoraSpec]:
    """The block float32 ``[rank, row_size]`` of a PEFT adapter, and what it trains (the seed is not known).

    Raises UserError, naming the key, for an adapter of another model or kind: it must cover whole groups of
    targets (attention, MLP, unembedding), have alpha 32, and share hidden-side factors among experts.
    """
    rank = _rank(config)
    known = {slot.key: slot for slot in _tensors(layout, _ALL_GROUPS)}
    tensors = _as_written_now(layout, peft_fused.one_by_one(layout, tensors, rank, _PREFIX))
    unknown = [key for key in tensors if key not in known]
    if unknown:
        raise UserError(
            f"the adapter has tensors that this base model has no LoRA target for: {_some(unknown)}"
        )
    groups = {known[key].target.group for key in tensors}
    missing = [key for key, slot in known.items() if slot.target.group in groups and key not in tensors]
    if missing or not groups:
        raise UserError(f"the adapter lacks tensors: {_some(missing or list(known))}")
    _check_placement(config, _placement(layout, groups, rank, LORA_ALPHA))
    block = torch.zeros(rank, layout.row_size)
    for key, tensor in tensors.items():
        known[key].write(layout, block, tensor)
    spec = LoraSpec(
        rank=rank, train_attn="attn" in groups, train_mlp="mlp" in groups, train_unembed="unembed" in groups
    )
    return block, spec


class _Tensor(NamedTuple):
    """One tensor of a PEFT adapter: A ``[r, in]`` or B ``[out, r]`` of a target, or of one of its experts.

    expert: which part of the block's columns it is; 0 where there is one part.
    shared: an expert's copy of a factor that all experts of the layer share; the first one is not marked.
    """

    key: str
    target: Target
    is_a: bool
    expert: int
    shared: bool

    def view(self, layout: AdapterLayout, block: torch.Tensor) -> torch.Tensor:
        """Its place in the block, ``[r, features]``."""
        target = self.target
        if self.is_a:
            columns, width = layout.a(block, target), target.in_features
        else:
            columns, width = layout.b_t(block, target), target.out_features
        return columns[:, self.expert * width : (self.expert + 1) * width]

    def read(self, layout: AdapterLayout, block: torch.Tensor) -> torch.Tensor:
        view = self.view(layout, block)
        return (view if self.is_a else view.t()).clone(memory_format=torch.contiguous_format)

    def write(self, layout: AdapterLayout, block: torch.Tensor, tensor: torch.Tensor) -> None:
        view = self.view(layout, block)
        place = view if self.is_a else view.t()
        if tensor.shape != place.shape:
            raise UserError(
                f"{self.key} has shape {list(tensor.shape)}; this base model needs {list(place.shape)}"
            )
        if not tensor.is_floating_point():
            raise UserError(f"{self.key} has type {tensor.dtype}; it must be a floating point type")
        if not tensor.isfinite().all():
            raise UserError(f"{self.key} has values that are not finite")
        if self.shared and not torch.equal(place, tensor.to(place.dtype)):
            raise UserError(
                f"{self.key} differs from that of the layer's first expert; only adapters whose hidden-side "
                "factors (A of gate_proj and up_proj, B of down_proj) are shared by all experts can be loaded"
            )
        place.copy_(tensor)


def _as_written_now(layout: AdapterLayout, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The experts of every family were once written with Qwen's names; such checkpoints are still read."""
    former = _tensors(layout, _ALL_GROUPS, DENSE)
    names = {old.key: new.key for old, new in zip(former, _tensors(layout, _ALL_GROUPS), strict=True)}
    renamed = {names.get(key, key): tensor for key, tensor in tensors.items()}
    if len(renamed) < len(tensors):
        twice = [key for key in tensors if names.get(key, key) != key and names[key] in tensors]
        raise UserError(f"the adapter has tensors under two names: {_some(twice)}")
    return renamed


def _tensors(
    layout: AdapterLayout, groups: Iterable[Group], family: Family | None = None
) -> Iterator[_Tensor]:
    """Every tensor of an adapter that trains ``groups``; a shared factor's first copy comes first.

    family: whose names, if not those of the layout.
    """
    wanted, family = set(groups), family or layout.family
    for target in layout.targets:
        if target.group not in wanted:
            continue
        for is_a in (True, False):
            factor = "lora_A" if is_a else "lora_B"
            per_expert = target.num_experts > 0 and (target.kind == "expert_down") == is_a
            for expert in range(max(1, target.num_experts)):
                key = f"{_PREFIX}{_module_name(family, target, expert)}.{factor}.weight"
                shared = target.num_experts > 0 and not per_expert and expert > 0
                yield _Tensor(key, target, is_a, expert if per_expert else 0, shared)


def _module_name(family: Family, target: Target, expert: int = 0) -> str:
    if target.kind == "linear":
        return target.path
    return family.expert(target.path, expert, _EXPERT_PARTS[target.kind])


def _rank(config: Mapping[str, Any]) -> int:
    """The rank in a PEFT configuration, everything else of which must be what this server computes."""
    for name in _MUST_BE_OFF:
        if config.get(name):
            raise UserError(f"adapter_config.json: {name} is not supported, got {config[name]!r:.100}")
    for name, wanted in (("peft_type", "LORA"), ("bias", "none"), ("lora_alpha", LORA_ALPHA)):
        if config.get(name) != wanted:
            raise UserError(f"adapter_config.json: {name} must be {wanted!r}, got {config.get(name)!r:.100}")
    rank = config.get("r")
    if not isinstance(rank, int) or not 1 <= rank <= MAX_RANK:
        raise UserError(f"adapter_config.json: r must be an integer from 1 to {MAX_RANK}, got {rank!r:.100}")
    return rank


def _check_placement(config: Mapping[str, Any], ours: Mapping[str, Any]) -> None:
    """It may lack what we write, as checkpoints once did, but say nothing else."""
    for name in PLACEMENT:
        found, wanted = config.get(name), ours.get(name)
        if isinstance(found, list) and all(isinstance(each, str) for each in found):
            found = sorted(found)
        if found and found != wanted:
            raise UserError(f"adapter_config.json: {name} is not supported, got {config[name]!r:.100}")


def _some(keys: list[str]) -> str:
    shown = ", ".join(keys[:3])
    return shown if len(keys) <= 3 else f"{shown} and {len(keys) - 3} more"
