"""Loading base models: what is served, what is refused, and what clients are told."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    DogeConfig,
    Gemma2Config,
    Gemma3TextConfig,
    Glm4Config,
    GPT2Config,
    GraniteConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    PhimoeConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen2MoeConfig,
    SeedOssConfig,
)

from twinkle_serve.config import ModelConfig
from twinkle_serve.engine import base_model
from twinkle_serve.engine.attention import PackedCausal
from twinkle_serve.engine.base_model import BaseModel, UnsupportedModel, load_base_model
from twinkle_serve.engine.layers import LoraLinear


def load(directory: Path, **fields: Any) -> BaseModel:
    return load_base_model(ModelConfig(name="m", path=str(directory), num_threads=1, **fields), directory)


def edited(source: Path, target: Path, **changes: Any) -> Path:
    """A copy of a model directory with another config.json."""
    shutil.copytree(source, target)
    config = json.loads((target / "config.json").read_text())
    (target / "config.json").write_text(json.dumps(config | changes))
    return target


def packed_logits(base: BaseModel, sequences: list[list[int]]) -> torch.Tensor:
    lengths = [len(sequence) for sequence in sequences]
    tokens = torch.tensor([token for sequence in sequences for token in sequence])
    positions = torch.cat([torch.arange(length) for length in lengths])
    base.segments.set({})
    with torch.no_grad():
        hidden = base.hidden_states(tokens, positions, PackedCausal(lengths))
        return base.full_logits(hidden, [])


SEQUENCES = [[5, 7, 11, 13], [1], [5, 7, 300, 2, 2]]


@pytest.mark.parametrize("model", ["tiny_moe", "tiny_qwen3", "tiny_llama"])
def test_packed_logits_are_the_model_s_own(model: str, request: pytest.FixtureRequest) -> None:
    directory: Path = request.getfixturevalue(model)
    logits = packed_logits(load(directory), SEQUENCES)
    own = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    with torch.no_grad():
        expected = torch.cat([own(torch.tensor([sequence])).logits[0] for sequence in SEQUENCES])
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


def test_moe_targets(tiny_moe: Path) -> None:
    base = load(tiny_moe)
    first = [target for target in base.layout.targets if ".layers.0." in target.path]
    found = {
        (
            t.path.removeprefix("model.layers.0."),
            t.kind,
            t.group,
            t.in_features,
            t.out_features,
            t.num_experts,
        )
        for t in first
    }
    assert found == {
        ("self_attn.q_proj", "linear", "attn", 64, 64, 0),
        ("self_attn.k_proj", "linear", "attn", 64, 32, 0),
        ("self_attn.v_proj", "linear", "attn", 64, 32, 0),
        ("self_attn.o_proj", "linear", "attn", 64, 64, 0),
        ("mlp.experts", "expert_gate", "mlp", 64, 32, 4),
        ("mlp.experts", "expert_up", "mlp", 64, 32, 4),
        ("mlp.experts", "expert_down", "mlp", 32, 64, 4),
    }
    assert len(base.layout.targets) == 2 * len(first) + 1
    head = base.layout.targets[base.head_target]
    assert (head.path, head.group, head.in_features, head.out_features) == ("lm_head", "unembed", 64, 350)


def test_dense_targets_and_frozen_weights(tiny_llama: Path) -> None:
    base = load(tiny_llama)
    leaves = [t.path.rpartition(".")[2] for t in base.layout.targets]
    per_layer = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    assert sorted(leaves) == sorted(2 * per_layer + ["lm_head"])
    assert not any(parameter.requires_grad for parameter in base.model.parameters())
    wrapped = [module for module in base.model.modules() if isinstance(module, LoraLinear)]
    assert [base.layout.targets[m.target_index].path for m in wrapped] == [
        name for name, module in base.model.named_modules() if isinstance(module, LoraLinear)
    ]


def test_info(tiny_moe: Path, tmp_path: Path) -> None:
    info = load(tiny_moe, max_rank=16, max_resident_adapters=3).info
    assert (info.name, info.arch) == ("m", "Qwen3MoeForCausalLM")
    assert info.tokenizer_id == str(tiny_moe.resolve())
    assert (info.vocab_size, info.max_context_length) == (350, 4096)
    assert (info.max_rank, info.max_slots) == (16, 3)
    assert load(tiny_moe, max_context_length=100).info.max_context_length == 100
    assert load(tiny_moe, max_context_length=10**6).info.max_context_length == 4096


@pytest.mark.parametrize(("eos", "expected"), [(3, (3,)), ([3, 4], (3, 4)), (None, ())])
def test_eos_token_ids(eos: Any, expected: tuple[int, ...], tiny_llama: Path, tmp_path: Path) -> None:
    directory = edited(tiny_llama, tmp_path / "m", eos_token_id=eos)
    generation = json.loads((directory / "generation_config.json").read_text())
    (directory / "generation_config.json").write_text(json.dumps(generation | {"eos_token_id": eos}))
    assert load(directory).info.eos_token_ids == expected


def test_bfloat16(tiny_moe: Path) -> None:
    base = load(tiny_moe, dtype="bfloat16")
    assert base.dtype == base.head.weight.dtype == torch.bfloat16
    logits, expected = packed_logits(base, SEQUENCES), packed_logits(load(tiny_moe), SEQUENCES)
    assert logits.dtype == torch.float32
    assert float((logits - expected).abs().max()) < 0.1 * float(expected.abs().max())


def test_no_model_directory_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModel, match=r"config\.json"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("model_type", "auto_map"),
    [("llama", {"AutoModelForCausalLM": "evil.Model"}), ("mine", {"AutoConfig": "evil.Config"})],
)
def test_a_model_with_code_of_its_own_is_refused(
    tiny_llama: Path, tmp_path: Path, model_type: str, auto_map: dict[str, str]
) -> None:
    directory = edited(tiny_llama, tmp_path / "m", model_type=model_type, auto_map=auto_map)
    with pytest.raises(UnsupportedModel, match="auto_map"):
        load(directory)


def test_a_model_type_that_nobody_knows_is_refused_with_the_list(tiny_llama: Path, tmp_path: Path) -> None:
    directory = edited(tiny_llama, tmp_path / "m", model_type="mine")
    with pytest.raises(UnsupportedModel, match=r"model_type 'mine' cannot be read .* [Mm]ixtral"):
        load(directory)


SMALL = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}


LONG = SMALL | {"max_position_embeddings": 256}
MOE = {"num_local_experts": 4, "num_experts_per_tok": 2}
ONLY_IN_THE_MASK = {
    "qwen2_moe": Qwen2MoeConfig(
        **LONG,
        moe_intermediate_size=16,
        shared_expert_intermediate_size=24,
        num_experts=4,
        num_experts_per_tok=2,
        use_sliding_window=True,
        sliding_window=16,
        max_window_layers=2,
    ),
    "phimoe": PhimoeConfig(**LONG, **MOE, sliding_window=16),
}


@pytest.mark.parametrize("name", ONLY_IN_THE_MASK)
def test_a_window_that_is_only_in_the_mask_is_refused_beyond_its_length(name: str, tmp_path: Path) -> None:
    AutoModelForCausalLM.from_config(ONLY_IN_THE_MASK[name]).save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModel, match="max_context_length to at most 16"):
        load(tmp_path)
    with pytest.raises(UnsupportedModel, match="window"):
        load(tmp_path, max_context_length=17)
    own = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    with torch.no_grad():
        expected = own(torch.arange(16)[None]).logits[0]
    logits = packed_logits(load(tmp_path, max_context_length=16), [list(range(16))])
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


def test_a_model_that_makes_a_mask_of_its_own_is_refused(tmp_path: Path) -> None:
    AutoModelForCausalLM.from_config(DogeConfig(**LONG, keep_window_size=16)).save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModel, match="DogeAttention makes an attention mask of its own"):
        load(tmp_path)


@pytest.mark.parametrize(
    "config",
    [
        MistralConfig(**LONG, sliding_window=16),
        MixtralConfig(**LONG, **MOE, sliding_window=16),
        Gemma3TextConfig(**LONG, head_dim=8, sliding_window=16),  # in some layers only
        Qwen2Config(**LONG, use_sliding_window=True, sliding_window=16, max_window_layers=1),
        LlamaConfig(**LONG, sliding_window=16),  # does not know of windows
    ],
)
def test_a_window_that_the_layers_pass_is_attended_through(config: Any, tmp_path: Path) -> None:
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    base = load(tmp_path)
    assert base.info.max_context_length == 256
    own = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    with torch.no_grad():
        expected = own(torch.arange(40)[None]).logits[0]
    torch.testing.assert_close(packed_logits(base, [list(range(40))]), expected, rtol=1e-4, atol=1e-4)


LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "short_factor": [1.0] * 8,
    "long_factor": [2.0] * 8,
    "original_max_position_embeddings": 32,
}
LAYERED = {"full_attention": LONGROPE, "sliding_attention": {"rope_type": "default", "rope_theta": 1e4}}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (GPT2Config(vocab_size=50, n_positions=16, n_embd=16, n_layer=1, n_head=2), "GPT2LMHeadModel"),
        (Glm4Config(**SMALL, head_dim=8, pad_token_id=0), "gate/up/down projections"),  # gate_up in one
        (Gemma2Config(**SMALL, head_dim=8), "attn_logit_softcapping is not served"),
        (GraniteConfig(**SMALL, logits_scaling=2.0), "packed logits differ"),
    ],
)
def test_an_architecture_that_we_would_get_wrong_is_refused(
    config: Any, message: str, tmp_path: Path
) -> None:
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModel, match=message):
        load(tmp_path)


@pytest.mark.parametrize(
    "config",
    [
        Qwen2Config(**SMALL),  # biases
        MistralConfig(**SMALL, sliding_window=5),  # shorter than the probe
        Qwen2MoeConfig(
            **SMALL,
            moe_intermediate_size=16,
            shared_expert_intermediate_size=24,
            num_experts=4,
            num_experts_per_tok=2,
        ),
        MixtralConfig(**SMALL, num_local_experts=4, num_experts_per_tok=2),
        Gemma3TextConfig(**SMALL, head_dim=8),  # scaled embeddings, norms of another kind
    ],
)
def test_relatives_of_the_named_families_load(config: Any, tmp_path: Path) -> None:
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    assert load(tmp_path).layout.row_size > 0  # its logits were compared while it was loaded


@pytest.mark.parametrize("config", [LONGROPE, LAYERED], ids=["one", "by layer"])
def test_rotations_that_look_at_the_whole_pass_are_refused(
    config: Any, tiny_llama: Path, tmp_path: Path
) -> None:
    """One tenant's long sequence would change what another one's short one gives."""
    directory = edited(tiny_llama, tmp_path / "m", rope_parameters=config)
    with pytest.raises(UnsupportedModel, match="longrope"):
        base_model._read_config(directory)


def test_activation_checkpointing_switches_no_dropout_on(tmp_path: Path) -> None:
    config = SeedOssConfig(**SMALL, head_dim=8)
    assert config.residual_dropout > 0
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    base = load(tmp_path, activation_checkpointing=True)
    expected = packed_logits(load(tmp_path), [[5, 7, 11], [1]])
    for _ in range(2):
        torch.testing.assert_close(packed_logits(base, [[5, 7, 11], [1]]), expected)
    assert all(layer.gradient_checkpointing and layer.training for layer in base.model.base_model.layers)


def test_missing_weights_are_an_os_error(tiny_llama: Path, tmp_path: Path) -> None:
    directory = edited(tiny_llama, tmp_path / "m")
    (directory / "model.safetensors").unlink()
    with pytest.raises(OSError, match=r"model\.safetensors"):
        load(directory)


def test_a_model_whose_logits_come_out_different_is_refused(
    tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As with an architecture that scales its logits, or attends in a way that we do not follow."""
    prepare = base_model.prepare

    def prepare_wrongly(model: PreTrainedModel, *args: Any) -> BaseModel:
        base = prepare(model, *args)
        with torch.no_grad():
            base.model.base_model.norm.weight.mul_(1.1)
        return base

    monkeypatch.setattr(base_model, "prepare", prepare_wrongly)
    with pytest.raises(UnsupportedModel, match="differ"):
        load(tiny_llama)


def test_models_do_not_share_what_was_put_into_them(tiny_moe: Path) -> None:
    """A config object shared with transformers' own class would switch its experts over as well."""
    base = load(tiny_moe)
    own = AutoModelForCausalLM.from_pretrained(tiny_moe, dtype=torch.float32).eval()
    with torch.no_grad():
        assert torch.isfinite(own(torch.tensor([[1, 2, 3]])).logits).all()
    assert base.model.config is not own.config


def test_a_model_without_a_context_length_needs_one_in_the_config(tiny_llama: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_llama)
    model.config.max_position_embeddings = 0
    config = ModelConfig(name="tiny", path=str(tiny_llama))
    device = torch.device("cpu")
    with pytest.raises(UnsupportedModel, match="max_context_length"):
        base_model.prepare(model, config, tiny_llama, device, torch.float32)


def test_in_bfloat16_a_row_that_went_to_another_expert_does_not_refuse_a_model() -> None:
    expected = torch.randn(7, 50, generator=torch.Generator().manual_seed(0))
    other = expected.clone()
    other[2] += 3
    assert base_model._difference(other, expected, torch.float32) > 0.5
    assert base_model._difference(other, expected, torch.bfloat16) == 0
    other[:4] += 3
    assert base_model._difference(other, expected, torch.bfloat16) > 0.5
    assert math.isnan(base_model._difference(expected * float("nan"), expected, torch.bfloat16))
