"""The converted Qwen3 tokenizer against tiktoken on the same ranks; SmolLM2's digits; the tiny tokenizer."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiktoken
from tokenizers import Tokenizer, models
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from twinkle_serve.testing.cache import file_from_pypi
from twinkle_serve.testing.tokenizers import (
    _QWEN3_SPLIT,
    DASHSCOPE,
    byte_letters,
    merges_of_ranks,
    read_tiktoken,
    save_qwen3_tokenizer,
    split_digits,
    tiny_tokenizer,
)

TEXTS = [
    "Hello, world!",
    "I'm sure they'LL say: it's 3,141.59 — isn't it?",
    "def f(x):\n    return x  **2\n\n\n\tprint('a\r\nb')   ",
    "你好，世界！通义千问是谁开发的？",
    "naïve café Straße ﬁancé — Ελληνικά, русский, العربية, हिन्दी, 한국어, 日本語",
    "🙂🙃👩‍👩‍👧‍👦 emoji ⚗️ \u200b zero\u00a0width",
    "   leading and trailing   \n \n",
    "",
]


@pytest.fixture(scope="module")
def qwen3(models_root: Path, tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerFast:
    directory = tmp_path_factory.mktemp("qwen3")
    save_qwen3_tokenizer(directory, cache=models_root)
    return AutoTokenizer.from_pretrained(directory)


@pytest.fixture(scope="module")
def ranks(models_root: Path) -> dict[bytes, int]:
    return read_tiktoken(file_from_pypi(models_root, DASHSCOPE, "dashscope/resources/qwen.tiktoken"))


@pytest.fixture(scope="module")
def reference(ranks: dict[bytes, int]) -> tiktoken.Encoding:
    return tiktoken.Encoding("qwen", pat_str=_QWEN3_SPLIT, mergeable_ranks=ranks, special_tokens={})


@pytest.mark.parametrize("text", TEXTS)
def test_qwen3_encodes_as_tiktoken_does(
    qwen3: PreTrainedTokenizerFast, reference: tiktoken.Encoding, text: str
) -> None:
    import unicodedata

    ids = qwen3.encode(text)
    assert ids == reference.encode_ordinary(unicodedata.normalize("NFC", text))
    assert qwen3.decode(ids) == unicodedata.normalize("NFC", text)


def test_qwen3_ids_that_everybody_knows(qwen3: PreTrainedTokenizerFast) -> None:
    assert qwen3.encode("Hello, world!") == [9707, 11, 1879, 0]
    assert len(qwen3) == 151_669
    assert qwen3.convert_tokens_to_ids(["<|endoftext|>", "<|im_start|>", "<|im_end|>"]) == [
        151643,
        151644,
        151645,
    ]
    assert qwen3.convert_tokens_to_ids(["<tool_call>", "<think>", "</think>"]) == [151657, 151667, 151668]
    assert (qwen3.eos_token, qwen3.pad_token, qwen3.bos_token) == ("<|im_end|>", "<|endoftext|>", None)


def test_qwen3_thinking_tokens_survive_decoding_but_control_tokens_do_not(
    qwen3: PreTrainedTokenizerFast,
) -> None:
    ids = qwen3.encode("<|im_start|><think>so</think><|im_end|>")
    assert qwen3.decode(ids, skip_special_tokens=True) == "<think>so</think>"


def test_qwen3_chat_template(qwen3: PreTrainedTokenizerFast) -> None:
    chat = [{"role": "user", "content": "Hi"}]
    assert qwen3.apply_chat_template(chat, tokenize=False) == "<|im_start|>user\nHi<|im_end|>\n"
    prompt = qwen3.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert prompt == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    silent = qwen3.apply_chat_template(
        chat, tokenize=False, add_generation_prompt=True, enable_thinking=False
    )
    assert silent == prompt + "<think>\n\n</think>\n\n"


def test_there_is_one_merge_for_each_longer_token(ranks: dict[bytes, int]) -> None:
    merges = merges_of_ranks(ranks)
    assert len(merges) == 151_387  # as many as in the published merges.txt
    assert [ranks[left + right] for left, right in merges] == list(range(256, 151_643))


def test_merges_of_ranks_follows_rank_order_not_length() -> None:
    ranks = {b"a": 0, b"b": 1, b"c": 2, b"bc": 3, b"ab": 4, b"abc": 5}
    assert merges_of_ranks(ranks) == [(b"b", b"c"), (b"a", b"b"), (b"a", b"bc")]


def test_read_tiktoken_skips_blank_lines(tmp_path: Path) -> None:
    path = tmp_path / "x.tiktoken"
    path.write_bytes(b"YQ== 0\n\nYmM= 1\n")
    assert read_tiktoken(path) == {b"a": 0, b"bc": 1}


def test_byte_letters_are_distinct_and_leave_ascii_alone() -> None:
    letters = byte_letters()
    assert len(set(letters.values())) == len(letters) == 256
    assert letters[ord("a")] == "a"
    assert letters[ord(" ")] == "Ġ"
    assert letters[ord("\n")] == "Ċ"


def test_split_digits_makes_every_digit_a_token() -> None:
    tokenizer = Tokenizer(models.BPE(vocab={"1": 0, "2": 1, "12": 2, "Ġ": 3, "a": 4}, merges=[("1", "2")]))
    split_digits(tokenizer)
    assert tokenizer.encode("a 12").tokens == ["a", "Ġ", "1", "2"]


@pytest.mark.parametrize("vocab_size", [259, 300, 350])
def test_the_tiny_tokenizer_has_exactly_the_size_asked_for(vocab_size: int) -> None:
    tokenizer = tiny_tokenizer(vocab_size)
    assert sorted(tokenizer.get_vocab().values()) == list(range(vocab_size))
    assert tokenizer.token_to_id("<|im_end|>") == vocab_size - 1


def test_the_tiny_tokenizer_is_the_same_every_time() -> None:
    assert tiny_tokenizer(350).to_str() == tiny_tokenizer(350).to_str()


@pytest.mark.parametrize("text", TEXTS)
def test_the_tiny_tokenizer_loses_nothing(tiny_moe: Path, text: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_moe)
    assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize("vocab_size", [100, 100_000])
def test_impossible_sizes_are_refused(vocab_size: int) -> None:
    with pytest.raises(ValueError, match=f"vocab_size {vocab_size}"):
        tiny_tokenizer(vocab_size)
