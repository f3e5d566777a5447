"""Where LoRA applies in a Hugging Face model: linear layers are wrapped, experts and attention are marked.

Knows names and shapes of modules. Does not know weights' values, slots or how a model was loaded.
"""

from __future__ import annotations

from torch import nn
from transformers import PreTrainedModel

from twinkle_serve.engine import experts
from twinkle_serve.engine.attention import AttentionSwitch
from twinkle_serve.engine.layers import LoraLinear, Segments
from twinkle_serve.engine.layout import Group, Target
from twinkle_serve.engine.pulse import listen
from twinkle_serve.engine.sharding.families import MIXTURES, SERVED
from twinkle_serve.engine.sharding.loading import is_fused_experts, whole_shape
from twinkle_serve.engine.sharding.strategy import Sharding
from twinkle_serve.engine.unsupported import UnsupportedModel

_LINEAR_GROUPS: dict[str, Group] = {
    "q_proj": "attn",
    "k_proj": "attn",
    "v_proj": "attn",
    "o_proj": "attn",
    "gate_proj": "mlp",
    "up_proj": "mlp",
    "down_proj": "mlp",
}
_ATTENTION = {"q_proj", "k_proj", "v_proj", "o_proj"}
_MLP = {"gate_proj", "up_proj", "down_proj"}


def attach(
    model: PreTrainedModel, segments: Segments, switch: AttentionSwitch, sharding: Sharding
) -> list[Target]:
    """Replace linear layers by LoRA layers and mark experts and attention modules; returns the targets."""
    targets: list[Target] = []
    layers = getattr(model.base_model, "layers", None)
    if not isinstance(layers, nn.ModuleList):
        raise UnsupportedModel(f"{type(model).__name__} has no list of decoder layers; {SERVED}")
    listen(layers)
    prefix = next(name for name, module in model.named_modules() if module is layers)
    for index, layer in enumerate(layers):
        found: set[str] = set()
        for name, module in list(layer.named_modules()):
            path = f"{prefix}.{index}.{name}"
            leaf = name.rpartition(".")[2]
            if isinstance(module, nn.Linear) and leaf in _LINEAR_GROUPS:
                _wrap_linear(layer, name, module, path, segments, targets)
                found.add(leaf)
            elif is_fused_experts(module):
                _require_known(model)
                _mark_experts(module, path, segments, targets, sharding)
                found.add("experts")
            if hasattr(module, "layer_idx") and hasattr(module, "q_proj"):
                module.twinkle_attention = switch
        if not found >= _ATTENTION or not (found >= _MLP or "experts" in found):
            raise UnsupportedModel(
                f"{type(model).__name__}: decoder layer {index} has no separate q_proj, k_proj, v_proj, "
                f"o_proj and gate/up/down projections or fused experts; {SERVED}"
            )
    return targets


def _require_known(model: PreTrainedModel) -> None:
    if model.config.model_type not in MIXTURES:
        raise UnsupportedModel(
            f"{type(model).__name__} is a mixture of experts that no adapter could be taken out of; {SERVED}"
        )


def _wrap_linear(
    layer: nn.Module, name: str, module: nn.Linear, path: str, segments: Segments, targets: list[Target]
) -> None:
    parent_name, _, leaf = name.rpartition(".")
    group = _LINEAR_GROUPS[leaf]
    wrapped = LoraLinear(module, segments, group, len(targets))
    setattr(layer.get_submodule(parent_name), leaf, wrapped)
    targets.append(Target("linear", path, group, module.in_features, module.out_features))


def _mark_experts(
    module: nn.Module, path: str, segments: Segments, targets: list[Target], sharding: Sharding
) -> None:
    plain = getattr(module, "is_concatenated", True) and getattr(module, "has_gate", True)
    odd = getattr(module, "is_transposed", False) or getattr(module, "has_bias", False)
    if not plain or odd:
        raise UnsupportedModel(f"{path}: transposed, interleaved or biased fused experts are not served")
    gate_up: nn.Parameter = module.gate_up_proj  # type: ignore[assignment]
    num_experts, double_inner, hidden = whole_shape(gate_up)
    if sharding.splits_experts:
        num_experts *= sharding.ranks.size
    inner, first = double_inner // 2, len(targets)
    targets += [
        Target("expert_gate", path, "mlp", hidden, inner, num_experts),
        Target("expert_up", path, "mlp", hidden, inner, num_experts),
        Target("expert_down", path, "mlp", inner, hidden, num_experts),
    ]
    dispatch = sharding.dispatch
    module.twinkle_targets = experts.ExpertTargets(  # type: ignore[assignment]
        segments if dispatch is None else dispatch.segments, first, first + 1, first + 2, dispatch
    )
