"""A checkpoint with the real shapes of some layers of Qwen3-30B-A3B and random weights.

Two layers are 3.7 GB in bfloat16, written a layer at a time. As a program: ``python -m
twinkle_serve.testing.real_shapes DIR``. Knows shapes and names; the logits mean nothing.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import Qwen3MoeConfig

from twinkle_serve.testing.tokenizers import QWEN3_VOCAB_SIZE, save_tiny_tokenizer

Shapes = dict[str, tuple[int, ...]]


def qwen3_30b_config(num_layers: int) -> Qwen3MoeConfig:
    return Qwen3MoeConfig(
        vocab_size=QWEN3_VOCAB_SIZE,
        hidden_size=2048,
        intermediate_size=6144,
        moe_intermediate_size=768,
        num_hidden_layers=num_layers,
        num_attention_heads=32,
        num_key_value_heads=4,
        head_dim=128,
        num_experts=128,
        num_experts_per_tok=8,
        norm_topk_prob=True,
        tie_word_embeddings=False,
        max_position_embeddings=40_960,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        architectures=["Qwen3MoeForCausalLM"],
        dtype="bfloat16",
        eos_token_id=0,
    )


def build_real_shapes(directory: Path, num_layers: int = 2) -> int:
    """Write the checkpoint into a new ``directory``; returns its weights' size in bytes."""
    directory.mkdir(parents=True)
    config = qwen3_30b_config(num_layers)
    config.save_pretrained(directory)
    save_tiny_tokenizer(directory, 350)
    weight_map: dict[str, str] = {}
    total = 0
    for index, shapes in enumerate(_files(config)):
        name = f"model-{index + 1:05d}-of-{num_layers + 1:05d}.safetensors"
        tensors = {key: _random(key, shape) for key, shape in shapes.items()}
        save_file(tensors, directory / name, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(tensors, name))
        total += sum(tensor.nbytes for tensor in tensors.values())
    index_file = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index_file))
    return total


def _files(config: Qwen3MoeConfig) -> Iterator[Shapes]:
    """The tensors of each file: one file a layer, and one with what is outside the layers."""
    hidden, vocabulary = config.hidden_size, config.vocab_size
    for layer in range(config.num_hidden_layers):
        yield {f"model.layers.{layer}.{name}": shape for name, shape in _layer(config).items()}
    yield {
        "model.embed_tokens.weight": (vocabulary, hidden),
        "model.norm.weight": (hidden,),
        "lm_head.weight": (vocabulary, hidden),
    }


def _layer(config: Qwen3MoeConfig) -> Shapes:
    hidden, inner, head = config.hidden_size, config.moe_intermediate_size, config.head_dim
    queries, keys = config.num_attention_heads * head, config.num_key_value_heads * head
    shapes: Shapes = {
        "self_attn.q_proj.weight": (queries, hidden),
        "self_attn.k_proj.weight": (keys, hidden),
        "self_attn.v_proj.weight": (keys, hidden),
        "self_attn.o_proj.weight": (hidden, queries),
        "self_attn.q_norm.weight": (head,),
        "self_attn.k_norm.weight": (head,),
        "input_layernorm.weight": (hidden,),
        "post_attention_layernorm.weight": (hidden,),
        "mlp.gate.weight": (config.num_experts, hidden),
    }
    for expert in range(config.num_experts):
        shapes[f"mlp.experts.{expert}.gate_proj.weight"] = (inner, hidden)
        shapes[f"mlp.experts.{expert}.up_proj.weight"] = (inner, hidden)
        shapes[f"mlp.experts.{expert}.down_proj.weight"] = (hidden, inner)
    return shapes


def _random(key: str, shape: tuple[int, ...]) -> torch.Tensor:
    if len(shape) == 1:
        return torch.ones(shape, dtype=torch.bfloat16)
    bound = (3 / shape[1]) ** 0.5  # of variance 1 / inputs
    return torch.empty(shape, dtype=torch.bfloat16).uniform_(-bound, bound)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m twinkle_serve.testing.real_shapes", description=__doc__)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--layers", type=int, default=2)
    options = parser.parse_args(arguments)
    torch.manual_seed(0)
    size = build_real_shapes(options.directory, options.layers)
    print(f"{options.directory}: {options.layers} layers, {size / 1e9:.2f} GB")


if __name__ == "__main__":
    main()
