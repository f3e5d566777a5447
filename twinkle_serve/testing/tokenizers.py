"""The tokenizers of the models made here: Qwen3's real one, SmolLM2's with its digits split, and a tiny one.

Knows byte-level BPE, the tokenizers library and ChatML. Does not know any model's weights.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from twinkle_serve.testing.cache import file_from_pypi

DASHSCOPE = "dashscope==2.0.2"
QWEN3_VOCAB_SIZE = 151_936  # rows of the official embedding: 151,669 tokens, padded

# Qwen3 marks the first of these as special (decoding may skip them) and the rest as ordinary added tokens.
_QWEN3_SPECIAL = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|object_ref_start|>",
    "<|object_ref_end|>",
    "<|box_start|>",
    "<|box_end|>",
    "<|quad_start|>",
    "<|quad_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
_QWEN3_ADDED = (
    "<tool_call>",
    "</tool_call>",
    "<|fim_prefix|>",
    "<|fim_middle|>",
    "<|fim_suffix|>",
    "<|fim_pad|>",
    "<|repo_name|>",
    "<|file_sep|>",
    "<tool_response>",
    "</tool_response>",
    "<think>",
    "</think>",
)

# How Qwen cuts text before BPE: contractions, words, single digits, punctuation, newlines, other space.
_QWEN3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)

CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}"
    "{% if enable_thinking is defined and not enable_thinking %}"
    "{{ '<think>\\n\\n</think>\\n\\n' }}"
    "{% endif %}"
    "{% endif %}"
)

_TINY_SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
# What the tiny tokenizer learns its merges from; only the pairs of letters in it matter.
_TINY_CORPUS = """
A small model needs a small vocabulary, and a small vocabulary still has to spell every word there is.
These lines are here so that the commonest pairs of letters become tokens of their own: the, and, ing, ion,
ent, her, for, tha, nth, int, ere, tio, ter, est, ers, ati, hat, ate, all, eth, hes, ver, his, oft, ith, fth.
Nobody reads what such a model writes. It is asked how likely a token was, which of two adapters moved, and
whether the same seed gave the same answer twice; for that, any text will do as long as it never changes.
Questions end with a question mark? Answers end with a full stop. Numbers are 0, 1, 2, 3 and so on to 9.
"""


def save_qwen3_tokenizer(directory: Path, cache: Path) -> None:
    """Write Qwen3's tokenizer into ``directory``, from the vocabulary that the dashscope package carries."""
    vocabulary = file_from_pypi(cache, DASHSCOPE, "dashscope/resources/qwen.tiktoken")
    tokenizer = qwen3_tokenizer(read_tiktoken(vocabulary))
    write_tokenizer(tokenizer, directory, eos="<|im_end|>", pad="<|endoftext|>", max_length=131_072)


def save_tiny_tokenizer(directory: Path, vocab_size: int) -> None:
    """Write a byte-level tokenizer of exactly ``vocab_size`` tokens (at least 259) into ``directory``."""
    write_tokenizer(
        tiny_tokenizer(vocab_size), directory, eos="<|im_end|>", pad="<|endoftext|>", max_length=4_096
    )


def read_tiktoken(path: Path) -> dict[bytes, int]:
    """Token bytes to rank, from tiktoken's text form (one base64 token and its rank a line)."""
    pairs = (line.split() for line in path.read_bytes().splitlines() if line)
    return {base64.b64decode(token): int(rank) for token, rank in pairs}


def merges_of_ranks(ranks: dict[bytes, int]) -> list[tuple[bytes, bytes]]:
    """The BPE merges, in rank order, that build every token of more than one byte.

    tiktoken keeps only the results of merges. A token's last merge is found by encoding its own bytes with
    the tokens of lower rank: what remains are its two halves.
    """
    longer = sorted((token for token in ranks if len(token) > 1), key=ranks.__getitem__)
    return [_halves(token, ranks) for token in longer]


def _halves(token: bytes, ranks: dict[bytes, int]) -> tuple[bytes, bytes]:
    parts = [token[i : i + 1] for i in range(len(token))]
    never = len(ranks)
    while len(parts) > 2:
        candidates = [ranks.get(left + right, never) for left, right in pairwise(parts)]
        best = candidates.index(min(candidates))
        assert candidates[best] < ranks[token], f"no merges lead to {token!r}"
        parts[best : best + 2] = [parts[best] + parts[best + 1]]
    return parts[0], parts[1]


def byte_letters() -> dict[int, str]:
    """The printable stand-in for each byte that byte-level BPE uses in vocabulary files.

    Bytes that Latin-1 prints stand for themselves; the other 68 take the code points from 256 upwards.
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {b: chr(256 + i) for i, b in enumerate(others)}


def qwen3_tokenizer(ranks: dict[bytes, int]) -> Tokenizer:
    letters = byte_letters()

    def spell(token: bytes) -> str:
        return "".join(letters[byte] for byte in token)

    vocabulary = {spell(token): rank for token, rank in ranks.items()}
    merges = [(spell(left), spell(right)) for left, right in merges_of_ranks(ranks)]
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_QWEN3_SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(_QWEN3_SPECIAL))
    tokenizer.add_tokens(list(_QWEN3_ADDED))
    return tokenizer


def tiny_tokenizer(vocab_size: int) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(_TINY_SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_TINY_CORPUS.splitlines(), trainer)
    tokenizer.add_special_tokens(list(_TINY_SPECIAL))
    if tokenizer.get_vocab_size() != vocab_size:
        raise ValueError(
            f"vocab_size {vocab_size}: the tiny tokenizer cannot have that many or that few tokens"
        )
    return tokenizer


def split_digits(tokenizer: Tokenizer) -> None:
    """Make ``tokenizer`` see every digit alone before byte-level BPE, as SmolLM2 was trained.

    A GGUF file only names its pre-tokenizer ("smollm"), and loaders fall back to GPT-2's.
    """
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )


def write_tokenizer(
    tokenizer: Tokenizer, directory: Path, *, eos: str, pad: str, max_length: int, template: str = CHATML
) -> None:
    """Write the files that ``AutoTokenizer.from_pretrained`` reads, with old and new transformers alike."""
    tokenizer.save(str(directory / "tokenizer.json"))
    special: Iterable[str] = (t.content for t in tokenizer.get_added_tokens_decoder().values() if t.special)
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": eos,
        "pad_token": pad,
        "bos_token": None,
        "unk_token": None,
        "additional_special_tokens": [token for token in special if token not in (eos, pad)],
        "add_bos_token": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": max_length,
        "chat_template": template,
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n")
