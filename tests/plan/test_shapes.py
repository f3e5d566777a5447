"""Shapes from config.json against the models that transformers makes of the same config."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from twinkle_serve.plan.shapes import ModelShapes, UnknownArchitecture, find_shapes, read_shapes

SMALL = {
    "hidden_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "intermediate_size": 80,
    "vocab_size": 100,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
}
MIXTURE = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 20}
CONFIGS: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama"},
    "llama with biases": {"model_type": "llama", "attention_bias": True},
    "tied": {"model_type": "llama", "tie_word_embeddings": True},
    "mistral": {"model_type": "mistral"},
    "qwen2": {"model_type": "qwen2", "head_dim": 12},
    "qwen3": {"model_type": "qwen3"},
    "qwen3_moe": {"model_type": "qwen3_moe", **MIXTURE},
    "some layers dense": {"model_type": "qwen3_moe", **MIXTURE, "mlp_only_layers": [1]},
    "every other layer dense": {"model_type": "qwen3_moe", **MIXTURE, "decoder_sparse_step": 2},
    "mixtral": {"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2},
}


def _parameters_in_transformers(config: dict[str, Any]) -> int:
    fields = {name: value for name, value in config.items() if name not in ("model_type", "architectures")}
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(config["model_type"], **fields))
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("name", CONFIGS)
def test_every_family_has_as_many_parameters_as_in_transformers(name: str) -> None:
    config = SMALL | CONFIGS[name]
    assert read_shapes(config).num_parameters == _parameters_in_transformers(config)


@pytest.mark.parametrize(
    ("name", "num_parameters"),
    [("Qwen3-30B-A3B", 30_532_122_624), ("Qwen3-235B-A22B", 235_093_634_560)],
)
def test_the_shipped_architectures_are_those_of_the_real_models(name: str, num_parameters: int) -> None:
    shapes = find_shapes(f"ms://Qwen/{name}")
    assert shapes.num_parameters == num_parameters
    path = Path("twinkle_serve/plan/architectures") / f"{name}.json"
    assert _parameters_in_transformers(json.loads(path.read_text())) == num_parameters


def test_an_adapter_of_qwen3_30b_has_as_many_parameters_as_tinkers() -> None:
    """The published counts by part: 14,450,688 r for the MLPs, 835,584 r attention, 153,984 r unembedding."""
    shapes = find_shapes("ms://Qwen/Qwen3-30B-A3B")
    assert shapes.lora_columns == 14_450_688 + 835_584 + 153_984
    assert 32 * shapes.lora_columns == pytest.approx(494e6, rel=1e-3)


def test_a_directory_is_read_under_both_names_of_the_number_of_experts(tmp_path: Path) -> None:
    def written(**fields: Any) -> ModelShapes:
        config = SMALL | CONFIGS["qwen3_moe"] | fields
        (tmp_path / "config.json").write_text(json.dumps(config))
        return find_shapes(str(tmp_path))

    shapes = written()
    assert (shapes.num_experts, shapes.expert_inner, shapes.context) == (6, 20, 64)
    renamed = dict(SMALL | CONFIGS["qwen3_moe"], num_local_experts=6)
    del renamed["num_experts"]
    assert read_shapes(renamed) == shapes


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "gpt2"}, r"config.json: model_type 'gpt2' is not one of llama, .*mixtral"),
        ({"model_type": "llama", "hidden_size": 8}, "config.json: num_attention_heads is missing"),
        ([], "config.json: it is not a JSON object"),
        (SMALL | {"model_type": "llama", "hidden_size": "x"}, "config.json: a size in it is wrong"),
        (
            SMALL | {"model_type": "llama", "num_attention_heads": 0, "head_dim": None},
            "a size in it is wrong",
        ),
    ],
)
def test_what_cannot_be_planned_is_named(tmp_path: Path, config: Any, message: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UnknownArchitecture, match=message):
        find_shapes(str(tmp_path))


def test_what_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(UnknownArchitecture, match=r"config\.json: .*No such file"):
        find_shapes(str(tmp_path))
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UnknownArchitecture, match=r"config\.json: Expecting"):
        find_shapes(str(tmp_path))
    with pytest.raises(UnknownArchitecture, match=r"ms://a/b is at hand \(there are: Qwen3-235B-A22B,"):
        find_shapes("ms://a/b")
