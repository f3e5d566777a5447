"""Arithmetic a token: counted from a configuration, compared with the formula written out."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoConfig

from twinkle_serve.engine import flops
from twinkle_serve.engine.flops import active_parameters, peak_flops


def attention(config: object) -> int:
    heads = config.num_attention_heads * config.head_dim
    kv = config.num_key_value_heads * config.head_dim
    return config.hidden_size * (2 * heads + 2 * kv)


def test_a_dense_model_multiplies_with_everything_but_the_embedding(tiny_qwen3: Path) -> None:
    config = AutoConfig.from_pretrained(tiny_qwen3)
    layer = attention(config) + 3 * config.hidden_size * config.intermediate_size
    head = config.vocab_size * config.hidden_size
    assert active_parameters(tiny_qwen3) == config.num_hidden_layers * layer + head


def test_of_a_mixture_only_the_experts_that_answer_count(tiny_moe: Path) -> None:
    config = AutoConfig.from_pretrained(tiny_moe)
    experts = config.num_experts_per_tok * 3 * config.hidden_size * config.moe_intermediate_size
    router = config.num_experts * config.hidden_size
    layer = attention(config) + experts + router
    head = config.vocab_size * config.hidden_size
    assert active_parameters(tiny_moe) == config.num_hidden_layers * layer + head


def test_a_tied_embedding_counts_as_the_head(tiny_llama: Path) -> None:
    config = AutoConfig.from_pretrained(tiny_llama)
    assert config.tie_word_embeddings
    layer = attention(config) + 3 * config.hidden_size * config.intermediate_size
    head = config.vocab_size * config.hidden_size
    assert active_parameters(tiny_llama) == config.num_hidden_layers * layer + head


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA H20", 148e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
    ],
)
def test_a_known_gpu_has_its_data_sheets_peak(
    monkeypatch: pytest.MonkeyPatch, name: str, peak: float
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert peak_flops(torch.device("cuda"), torch.bfloat16) == peak


def test_otherwise_it_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([0.0, 2.0, 10.0, 10.5, 20.0, 21.0])
    monkeypatch.setattr(flops.time, "perf_counter", lambda: next(times))
    assert peak_flops(torch.device("cpu"), torch.float32) == 2 * 512**3 / 0.5
