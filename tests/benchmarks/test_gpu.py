from __future__ import annotations

from pathlib import Path

import pytest
from transformers import AutoConfig, Qwen3MoeConfig

from benchmarks import gpu


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same kind of model, of no size."""

    def config(num_layers: int) -> Qwen3MoeConfig:
        return Qwen3MoeConfig(
            vocab_size=64,
            hidden_size=16,
            intermediate_size=16,
            moe_intermediate_size=16,
            num_hidden_layers=num_layers,
            num_attention_heads=2,
            num_key_value_heads=2,
            head_dim=8,
            num_experts=2,
            num_experts_per_tok=1,
        )

    monkeypatch.setattr(gpu, "qwen3_30b_config", config)


def test_a_model_has_as_many_layers_as_it_was_asked_for(tmp_path: Path) -> None:
    for num_layers in (1, 2, 1):
        directory = gpu.build(tmp_path, num_layers, "cpu")
        assert AutoConfig.from_pretrained(directory).num_hidden_layers == num_layers


def test_a_model_is_built_once(tmp_path: Path) -> None:
    weights = gpu.build(tmp_path, 1, "cpu") / "model.safetensors"
    weights.write_bytes(b"as it was")
    gpu.build(tmp_path, 1, "cpu")
    assert weights.read_bytes() == b"as it was"


def test_one_that_was_cut_off_in_saving_is_built_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def cut_off(model: object, directory: Path, **_: object) -> None:
        directory.mkdir()
        (directory / "config.json").write_text("{}")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("transformers.PreTrainedModel.save_pretrained", cut_off)
        with pytest.raises(KeyboardInterrupt):
            gpu.build(tmp_path, 1, "cpu")
    assert (gpu.build(tmp_path, 1, "cpu") / "model.safetensors").exists()
