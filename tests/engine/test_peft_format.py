"""Exported adapters in real PEFT, against merged weights; the way back, bit for bit; and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedModel

from twinkle_serve.engine.layout import AdapterLayout, Target
from twinkle_serve.engine.peft_format import PLACEMENT, export_peft, import_peft
from twinkle_serve.engine.sharding.families import DENSE, MIXTURES, family_of
from twinkle_serve.protocol.data import LoraSpec
from twinkle_serve.protocol.errors import UserError

# Of PEFT itself, which gets its own patterns for fused experts and tied embeddings right all the same.
pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys did not match:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning"),
]

RANK = 3
SCALE = 32 / RANK


def layout_of(model: PreTrainedModel) -> AdapterLayout:
    """The targets of a model as its own modules and parameters show them."""
    targets = []
    for path, module in model.named_modules():
        leaf = path.rsplit(".", 1)[-1]
        if isinstance(module, torch.nn.Linear) and leaf != "gate":
            group = {"lm_head": "unembed"}.get(leaf, "attn" if ".self_attn." in path else "mlp")
            targets.append(Target("linear", path, group, module.in_features, module.out_features))  # type: ignore[arg-type]
        elif leaf == "experts":
            count, double_inner, hidden = module.gate_up_proj.shape
            inner = double_inner // 2
            targets.append(Target("expert_gate", path, "mlp", hidden, inner, count))
            targets.append(Target("expert_up", path, "mlp", hidden, inner, count))
            targets.append(Target("expert_down", path, "mlp", inner, hidden, count))
    return AdapterLayout.build(targets, family_of(model.config.model_type))


def random_block(layout: AdapterLayout, spec: LoraSpec, seed: int = 0) -> torch.Tensor:
    """A trained-looking block: both factors random where the spec trains, zero elsewhere."""
    generator = torch.Generator().manual_seed(seed)
    flags = {"attn": spec.train_attn, "mlp": spec.train_mlp, "unembed": spec.train_unembed}
    block = torch.zeros(spec.rank, layout.row_size)
    for target in layout.targets:
        if flags[target.group]:
            layout.a(block, target).copy_(torch.randn(spec.rank, target.a_width, generator=generator) * 0.1)
            layout.b_t(block, target).copy_(
                torch.randn(spec.rank, target.b_width, generator=generator) * 0.05
            )
    return block


@torch.no_grad()
def merge(model: PreTrainedModel, layout: AdapterLayout, block: torch.Tensor) -> None:
    """Add scale * B A to the model's own weights, expert by expert."""
    for target in layout.targets:
        a = block[:, target.a_offset : target.a_offset + target.a_width]
        b_t = block[:, target.b_offset : target.b_offset + target.b_width]
        module = model.get_submodule(target.path)
        if target.kind == "linear":
            # A new parameter, so that a tied embedding stays as it is.
            module.weight = torch.nn.Parameter(module.weight + SCALE * (b_t.t() @ a))
            continue
        inner = target.in_features if target.kind == "expert_down" else target.out_features
        for expert in range(target.num_experts):
            part = slice(expert * inner, (expert + 1) * inner)
            if target.kind == "expert_gate":
                module.gate_up_proj[expert, :inner] += SCALE * (b_t[:, part].t() @ a)
            elif target.kind == "expert_up":
                module.gate_up_proj[expert, inner:] += SCALE * (b_t[:, part].t() @ a)
            else:
                module.down_proj[expert] += SCALE * (b_t.t() @ a[:, part])


def write(directory: Path, config: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
    (directory / "adapter_config.json").write_text(json.dumps(config))
    save_file(tensors, directory / "adapter_model.safetensors")


@pytest.mark.parametrize("family", ["tiny_moe", "tiny_mixtral", "tiny_qwen3", "tiny_llama"])
@pytest.mark.parametrize(
    "trained",
    [
        {},
        {"train_mlp": False, "train_unembed": False},
        {"train_attn": False, "train_unembed": False},
        {"train_attn": False, "train_mlp": False},
    ],
    ids=["all", "attn", "mlp", "unembed"],
)
def test_peft_computes_what_the_merged_weights_compute(
    family: str, trained: dict[str, bool], tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    directory = request.getfixturevalue(family)
    spec = LoraSpec(rank=RANK, **trained)
    base = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    layout = layout_of(base)
    block = random_block(layout, spec)
    write(tmp_path, *export_peft(layout, block, spec, "some/base"))
    tokens = torch.arange(5, 45).view(2, 20)
    with torch.no_grad():
        untouched = base(tokens).logits
        adapted = PeftModel.from_pretrained(base, tmp_path).eval()
        actual = adapted(tokens).logits
        merged = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
        merge(merged, layout, block)
        expected = merged(tokens).logits
    factors = {name: p for name, p in adapted.named_parameters() if "lora_" in name}
    assert factors
    assert all(parameter.any() for parameter in factors.values()), "PEFT left a factor at its zero start"
    assert (actual - untouched).abs().max() > 1e-2
    torch.testing.assert_close(actual.log_softmax(-1), expected.log_softmax(-1), rtol=1e-4, atol=1e-4)


def test_what_peft_saves_again_is_what_was_exported(tiny_qwen3: Path, tmp_path: Path) -> None:
    base = AutoModelForCausalLM.from_pretrained(tiny_qwen3, dtype=torch.float32)
    layout, spec = layout_of(base), LoraSpec(rank=RANK)
    config, tensors = export_peft(layout, random_block(layout, spec), spec, str(tiny_qwen3))
    write(tmp_path, config, tensors)
    PeftModel.from_pretrained(base, tmp_path).save_pretrained(tmp_path / "again", save_embedding_layers=False)
    saved = load_file(tmp_path / "again" / "adapter_model.safetensors")
    assert saved.keys() == tensors.keys()
    assert all(torch.equal(saved[key], tensors[key]) for key in tensors)
    again = json.loads((tmp_path / "again" / "adapter_config.json").read_text())
    assert {key: again[key] for key in config if key != "target_modules"} == {
        key: value for key, value in config.items() if key != "target_modules"
    }
    assert sorted(again["target_modules"]) == config["target_modules"]
    block, _ = import_peft(layout, again, saved)
    assert torch.equal(block, random_block(layout, spec))


LAYOUT = AdapterLayout.build(
    [
        Target("linear", "model.layers.0.self_attn.q_proj", "attn", 5, 7),
        Target("expert_gate", "model.layers.0.mlp.experts", "mlp", 5, 3, 4),
        Target("expert_up", "model.layers.0.mlp.experts", "mlp", 5, 3, 4),
        Target("expert_down", "model.layers.0.mlp.experts", "mlp", 3, 5, 4),
        Target("linear", "model.layers.1.mlp.down_proj", "mlp", 6, 5),
        Target("linear", "lm_head", "unembed", 5, 20),
    ]
)


@settings(max_examples=40, deadline=None)
@given(
    rank=st.integers(1, 32),
    flags=st.tuples(st.booleans(), st.booleans(), st.booleans()).filter(any),
    seed=st.integers(0, 99),
)
def test_the_way_back_is_bitwise(rank: int, flags: tuple[bool, bool, bool], seed: int) -> None:
    spec = LoraSpec(rank, 0, *flags)
    block = random_block(LAYOUT, spec, seed)
    config, tensors = export_peft(LAYOUT, block, spec, "base")
    again, found = import_peft(LAYOUT, json.loads(json.dumps(config)), tensors)
    assert torch.equal(again, block)
    assert found == spec


def test_keys_and_shapes_are_those_of_the_published_format() -> None:
    spec = LoraSpec(rank=2)
    config, tensors = export_peft(LAYOUT, random_block(LAYOUT, spec), spec, "base")
    prefix = "base_model.model.model.layers"
    assert tensors[f"{prefix}.0.self_attn.q_proj.lora_A.weight"].shape == (2, 5)
    assert tensors[f"{prefix}.0.self_attn.q_proj.lora_B.weight"].shape == (7, 2)
    for expert in range(4):
        for name, fan_in, fan_out in (("gate_proj", 5, 3), ("up_proj", 5, 3), ("down_proj", 3, 5)):
            assert tensors[f"{prefix}.0.mlp.experts.{expert}.{name}.lora_A.weight"].shape == (2, fan_in)
            assert tensors[f"{prefix}.0.mlp.experts.{expert}.{name}.lora_B.weight"].shape == (fan_out, 2)
    assert tensors["base_model.model.lm_head.lora_B.weight"].shape == (20, 2)
    assert len(tensors) == 2 + 4 * 3 * 2 + 2 + 2
    assert config["target_modules"] == ["down_proj", "gate_proj", "lm_head", "q_proj", "up_proj"]
    assert (config["r"], config["lora_alpha"], config["base_model_name_or_path"]) == (2, 32, "base")


def test_mixtral_s_experts_have_the_names_of_mixtral_s_files() -> None:
    layout = AdapterLayout.build(LAYOUT.targets, MIXTURES["mixtral"])
    spec = LoraSpec(rank=2, train_unembed=False)
    config, tensors = export_peft(layout, random_block(layout, spec), spec, "base")
    block = "base_model.model.model.layers.0.block_sparse_moe.experts"
    for name, fan_in, fan_out in (("w1", 5, 3), ("w3", 5, 3), ("w2", 3, 5)):
        assert tensors[f"{block}.3.{name}.lora_A.weight"].shape == (2, fan_in)
        assert tensors[f"{block}.3.{name}.lora_B.weight"].shape == (fan_out, 2)
    assert config["target_modules"] == ["down_proj", "q_proj", "w1", "w2", "w3"]


def test_adapters_written_with_qwen_s_names_for_mixtral_are_still_read() -> None:
    layout, spec = AdapterLayout.build(LAYOUT.targets, MIXTURES["mixtral"]), LoraSpec(rank=2)
    former = AdapterLayout(layout.targets, layout.row_size, DENSE)
    config, tensors = export_peft(former, random_block(layout, spec), spec, "base")
    assert GATE in tensors
    block, found = import_peft(layout, config, tensors)
    assert torch.equal(block, random_block(layout, spec))
    assert found == spec
    twice = tensors | export_peft(layout, block, spec, "base")[1]
    with pytest.raises(UserError, match=r"under two names: .*experts.0.gate_proj"):
        import_peft(layout, config, twice)


@pytest.mark.parametrize("rank", [1, 2])
def test_exported_tensors_are_copies_that_share_no_memory(rank: int) -> None:
    """At rank 1 the rows of a block are contiguous already, and nothing else would copy them."""
    spec = LoraSpec(rank=rank)
    block = random_block(LAYOUT, spec)
    _, tensors = export_peft(LAYOUT, block, spec, "base")
    storages = {tensor.untyped_storage().data_ptr() for tensor in tensors.values()}
    assert len(storages) == len(tensors)
    assert block.untyped_storage().data_ptr() not in storages
    assert all(tensor.is_contiguous() and tensor.dtype == torch.float32 for tensor in tensors.values())


def test_only_trained_groups_are_written() -> None:
    spec = LoraSpec(rank=2, train_mlp=False, train_unembed=False)
    config, tensors = export_peft(LAYOUT, random_block(LAYOUT, spec), spec, "base")
    assert config["target_modules"] == ["q_proj"]
    assert all(".q_proj." in key for key in tensors)


def test_half_precision_adapters_are_widened() -> None:
    spec = LoraSpec(rank=2)
    config, tensors = export_peft(LAYOUT, random_block(LAYOUT, spec), spec, "base")
    block, _ = import_peft(LAYOUT, config, {key: tensor.bfloat16() for key, tensor in tensors.items()})
    assert block.dtype == torch.float32
    assert torch.equal(block, random_block(LAYOUT, spec).bfloat16().float())


Q = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
GATE = "base_model.model.model.layers.0.mlp.experts.2.gate_proj.lora_A.weight"
DOWN = "base_model.model.model.layers.0.mlp.experts.3.down_proj.lora_B.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({Q: torch.zeros(2, 6)}, r"q_proj.lora_A.weight has shape \[2, 6\]; this base model needs \[2, 5\]"),
        ({Q: torch.zeros(3, 5)}, r"has shape \[3, 5\]"),
        ({Q: torch.zeros(2, 5, dtype=torch.int8)}, "floating point"),
        ({Q: torch.full((2, 5), float("nan"))}, "q_proj.lora_A.weight has values that are not finite"),
        ({Q: None}, "lacks tensors: .*q_proj.lora_A.weight"),
        ({GATE: None}, "lacks tensors: .*experts.2.gate_proj.lora_A.weight"),
        ({GATE: torch.zeros(2, 5)}, "experts.2.gate_proj.lora_A.weight differs .* shared by all experts"),
        ({DOWN: torch.zeros(5, 2)}, "experts.3.down_proj.lora_B.weight differs .* shared by all experts"),
        (
            {"base_model.model.lm_head.weight": torch.zeros(20, 5)},
            "no LoRA target for: base_model.model.lm_head.weight",
        ),
        ({Q.replace("layers.0", "layers.9"): torch.zeros(2, 5)}, "no LoRA target for: .*layers.9"),
        ({Q.replace("lora_A", "lora_magnitude_vector"): torch.zeros(7)}, "no LoRA target for"),
    ],
)
def test_tensors_that_do_not_fit_are_refused_by_name(
    change: dict[str, torch.Tensor | None], message: str
) -> None:
    spec = LoraSpec(rank=2)
    config, tensors = export_peft(LAYOUT, random_block(LAYOUT, spec), spec, "base")
    changed = {key: tensor for key, tensor in {**tensors, **change}.items() if tensor is not None}
    with pytest.raises(UserError, match=message):
        import_peft(LAYOUT, config, changed)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"r": 33}, "r must be an integer from 1 to 32, got 33"),
        ({"r": 0}, "r must be an integer from 1 to 32, got 0"),
        ({"r": None}, "r must be an integer"),
        ({"r": 4}, "has shape"),
        ({"lora_alpha": 16}, "lora_alpha must be 32, got 16"),
        ({"peft_type": "IA3"}, "peft_type must be 'LORA'"),
        ({"bias": "all"}, "bias must be 'none'"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save is not supported"),
        ({"use_dora": True}, "use_dora is not supported"),
        ({"use_rslora": True}, "use_rslora is not supported"),
        ({"rank_pattern": {"q_proj": 8}}, "rank_pattern is not supported"),
        ({"target_parameters": ["q_proj.weight"]}, "target_parameters is not supported"),
    ],
)
def test_configurations_that_mean_something_else_are_refused(change: dict[str, Any], message: str) -> None:
    spec = LoraSpec(rank=2)
    config, tensors = export_peft(LAYOUT, random_block(LAYOUT, spec), spec, "base")
    with pytest.raises(UserError, match=message):
        import_peft(LAYOUT, {**config, **change}, tensors)


WRAPPED = AdapterLayout.build(LAYOUT.targets, MIXTURES["qwen2_moe"])


def test_experts_that_peft_wraps_come_back_bitwise_and_their_former_layout_is_still_read() -> None:
    spec = LoraSpec(rank=2)
    block = random_block(WRAPPED, spec)
    config, tensors = export_peft(WRAPPED, block, spec, "base")
    one_by_one = export_peft(LAYOUT, block, spec, "base")[1]
    assert tensors.keys() != one_by_one.keys()
    plain = {name: setting for name, setting in config.items() if name not in PLACEMENT}
    for written in ((config, tensors), (plain, one_by_one)):
        found, trained = import_peft(WRAPPED, *written)
        assert torch.equal(found, block)
        assert trained == spec


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(next(k for k in t if "base_layer.lora_B" in k)), "lacks tensors"),
        (lambda t: t[next(k for k in t if "base_layer.lora_B" in k)].add_(1), "mixes gate_proj and up_proj"),
        (
            lambda t: t.update({k: v[:-1] for k, v in t.items() if k.endswith("experts.lora_A.weight")}),
            "has shape",
        ),
        (lambda t: t[next(k for k in t if "base_layer.lora_A" in k)][-1].add_(1), "first expert"),
    ],
    ids=["lacking", "mixed", "shape", "not shared"],
)
def test_wrapped_experts_that_do_not_fit_are_refused(change: Callable[[Any], object], message: str) -> None:
    spec = LoraSpec(rank=2)
    config, tensors = export_peft(WRAPPED, random_block(WRAPPED, spec), spec, "base")
    change(tensors)
    with pytest.raises(UserError, match=message):
        import_peft(WRAPPED, config, tensors)


def test_an_adapter_without_tensors_is_refused() -> None:
    config, _ = export_peft(LAYOUT, torch.zeros(2, LAYOUT.row_size), LoraSpec(rank=2), "base")
    with pytest.raises(UserError, match="lacks tensors"):
        import_peft(LAYOUT, config, {})
