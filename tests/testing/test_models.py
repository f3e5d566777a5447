"""The built directories load as any Hugging Face model does, hold what was asked for, and repeat exactly."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from twinkle_serve.testing.models import (
    build_bench_moe,
    build_tiny_llama,
    build_tiny_qwen3,
    build_tiny_qwen3_moe,
    main,
)


def test_the_mixture_of_experts_has_the_shape_asked_for(tmp_path: Path) -> None:
    path = build_tiny_qwen3_moe(
        tmp_path, hidden_size=32, num_layers=3, num_experts=6, num_experts_per_token=3, expert_size=16
    )
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    assert len(model.model.layers) == 3
    assert model.model.layers[0].mlp.experts.gate_up_proj.shape == (6, 2 * 16, 32)
    assert model.config.num_experts_per_tok == 3
    assert model.lm_head.weight.data_ptr() != model.model.embed_tokens.weight.data_ptr()
    assert model(torch.tensor([[1, 2, 3]])).logits.shape == (1, 3, 350)


def test_every_layer_routes_tokens_to_different_experts(tiny_moe: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_moe, dtype=torch.float32)
    logits = model(torch.arange(300)[None], output_router_logits=True).router_logits
    for layer in logits:
        assert set(layer.topk(2).indices.flatten().tolist()) == {0, 1, 2, 3}


@pytest.mark.parametrize("build", [build_tiny_qwen3, build_tiny_llama])
@pytest.mark.parametrize("tied", [False, True])
def test_dense_models_tie_their_unembedding_on_request(tmp_path: Path, build, tied: bool) -> None:
    model = AutoModelForCausalLM.from_pretrained(build(tmp_path, tie_word_embeddings=tied))
    same = model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()
    assert same == tied


@pytest.mark.parametrize("build", [build_tiny_qwen3_moe, build_tiny_qwen3, build_tiny_llama])
def test_models_are_not_degenerate(tmp_path: Path, build) -> None:
    """Context matters, and no two words tie for the best: greedy decoding has one right answer."""
    model = AutoModelForCausalLM.from_pretrained(build(tmp_path), dtype=torch.float32)
    logits = model(torch.tensor([[5, 6, 7], [8, 6, 7]])).logits
    assert (logits[0, -1] - logits[1, -1]).abs().max() > 0.1
    best = logits.flatten(0, 1).topk(2).values
    assert (best[:, 0] - best[:, 1]).min() > 1e-4


def test_the_seed_decides_the_weights_and_disturbs_nobody(tmp_path: Path) -> None:
    torch.manual_seed(7)
    before = torch.random.get_rng_state()
    one = build_tiny_llama(tmp_path / "one", seed=1)
    assert torch.equal(torch.random.get_rng_state(), before)
    again, other = build_tiny_llama(tmp_path / "again", seed=1), build_tiny_llama(tmp_path / "one", seed=2)
    assert one.name == again.name
    assert one.name != other.name
    first, second, third = (load_file(path / "model.safetensors") for path in (one, again, other))
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert not torch.equal(first["model.embed_tokens.weight"], third["model.embed_tokens.weight"])


def test_generation_ends_at_the_end_of_the_turn(tiny_moe: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_moe)
    model = AutoModelForCausalLM.from_pretrained(tiny_moe)
    assert model.generation_config.eos_token_id == tokenizer.convert_tokens_to_ids("<|im_end|>")


def test_the_qwen_vocabulary_comes_with_its_padding_rows(tiny_moe_qwen_vocab: Path) -> None:
    assert AutoConfig.from_pretrained(tiny_moe_qwen_vocab).vocab_size == 151_936


def test_the_command_line_prints_the_directory(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["tiny-llama", str(tmp_path)])
    printed = Path(capsys.readouterr().out.splitlines()[-1])
    assert printed == build_tiny_llama(tmp_path)


@pytest.mark.slow
def test_the_benchmark_model_has_about_fifty_million_parameters(models_root: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(build_bench_moe(models_root))
    assert 45e6 < model.num_parameters() < 55e6


@pytest.mark.slow
def test_smollm2_knows_the_capital_of_france(smollm2: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    model = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32)
    assert not hasattr(model.config, "quantization_config")
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(
        chat, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    output = model.generate(**prompt, max_new_tokens=20, do_sample=False)
    assert "Paris" in tokenizer.decode(output[0, prompt["input_ids"].shape[1] :])
    assert output[0, -1] == tokenizer.eos_token_id


@pytest.mark.slow
def test_smollm2_sees_single_digits(smollm2: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    assert tokenizer.tokenize("In 1984") == ["In", "Ġ", "1", "9", "8", "4"]
