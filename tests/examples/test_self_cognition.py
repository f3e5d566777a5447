"""The self-cognition example's own parts: its data, its datums, its batches, its plot."""

from __future__ import annotations

import json
from itertools import chain
from pathlib import Path

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from examples.self_cognition import (
    DATA,
    chat_prompt,
    draw,
    load_conversations,
    parse_options,
    shuffled_batches,
    to_datum,
)


@pytest.fixture(scope="module")
def tokenizer(tiny_llama: Path) -> PreTrainedTokenizerFast:
    return AutoTokenizer.from_pretrained(tiny_llama)


def test_every_conversation_names_the_model_and_its_author() -> None:
    rows = [json.loads(line) for line in DATA.read_text(encoding="utf-8").splitlines()]
    assert len(rows) == 100
    for row in rows:
        assert set(row) == {"query", "response"}
        assert "{{NAME}}" in row["response"]
        assert "{{AUTHOR}}" in row["response"]
    assert len({row["query"] for row in rows}) == len(rows)


def test_about_half_of_the_questions_are_chinese() -> None:
    questions = [row["query"] for row in load_conversations(DATA, "N", "A")]
    chinese = [q for q in questions if any("\u4e00" <= letter <= "\u9fff" for letter in q)]
    assert 40 <= len(chinese) <= 60


def test_placeholders_are_filled_in_questions_and_answers(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text(
        '{"query": "{{NAME}}?", "response": "{{NAME}} by {{AUTHOR}}, {{NAME}}"}\n', encoding="utf-8"
    )
    assert load_conversations(path, "Ann", "Bob") == [{"query": "Ann?", "response": "Ann by Bob, Ann"}]
    assert "{{" not in str(load_conversations(DATA, "Ann", "Bob"))


def test_only_the_answer_and_its_end_are_learnt(tokenizer: PreTrainedTokenizerFast) -> None:
    datum = to_datum(tokenizer, {"query": "Who are you?", "response": "I am Ann."})
    tokens = datum.model_input.to_ints()
    targets = datum.loss_fn_inputs["target_tokens"].data
    weights = datum.loss_fn_inputs["weights"].data
    assert len(tokens) == len(targets) == len(weights)
    assert tokens[1:] == targets[:-1]
    learnt = [token for token, weight in zip(targets, weights, strict=True) if weight == 1.0]
    assert tokenizer.decode(learnt) == "I am Ann.<|im_end|>"
    assert set(weights) == {0.0, 1.0}


def test_the_datum_continues_the_prompt_that_is_asked_later(tokenizer: PreTrainedTokenizerFast) -> None:
    prompt = chat_prompt(tokenizer, "Who are you?")
    datum = to_datum(tokenizer, {"query": "Who are you?", "response": "I am Ann."})
    assert datum.model_input.to_ints()[: len(prompt)] == prompt
    assert tokenizer.decode(prompt) == "<|im_start|>user\nWho are you?<|im_end|>\n<|im_start|>assistant\n"


def test_an_epoch_sees_every_datum_once_in_an_order_of_its_own(tokenizer: PreTrainedTokenizerFast) -> None:
    data = [to_datum(tokenizer, {"query": str(i), "response": str(i)}) for i in range(10)]
    first, other = (list(shuffled_batches(data, 4, seed=seed)) for seed in (0, 1))
    assert [len(batch) for batch in first] == [4, 4, 2]
    assert sorted(map(id, chain(*first))) == sorted(map(id, data))
    assert list(chain(*first)) != list(chain(*other))
    assert first == list(shuffled_batches(data, 4, seed=0))


def test_the_plot_is_a_png(tmp_path: Path) -> None:
    draw([2.0, 1.0, 0.5], tmp_path / "loss.png")
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_the_address_may_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TINKER_BASE_URL", "http://127.0.0.1:1234")
    assert parse_options([]).base_url == "http://127.0.0.1:1234"
    assert parse_options(["--base-url", "http://x"]).base_url == "http://x"
