"""The examples' own arithmetic: masks, baselines, soft targets, preferences."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerFast

EXAMPLES = Path(__file__).parent.parent.parent / "examples"


@pytest.fixture(autouse=True)
def _as_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """They import what lies beside them."""
    monkeypatch.syspath_prepend(str(EXAMPLES))


@pytest.fixture(scope="module")
def tokenizer(tiny_llama: Path) -> PreTrainedTokenizerFast:
    return AutoTokenizer.from_pretrained(tiny_llama)


def columns(datum: Any) -> dict[str, list[float]]:
    return {name: list(tensor.data) for name, tensor in datum.loss_fn_inputs.items()}


def test_a_datum_predicts_the_next_token() -> None:
    from shared import to_datum

    datum = to_datum([7, 8, 9], weights=[5.0, 0.0, 1.0])
    assert datum.model_input.to_ints() == [7, 8]
    assert columns(datum) == {"target_tokens": [8, 9], "weights": [0.0, 1.0]}


def test_only_the_assistants_turns_are_learnt(tokenizer: PreTrainedTokenizerFast) -> None:
    from agentic_sft import calculator, conversation, masked_datum

    chat = conversation(3)
    datum = masked_datum(tokenizer, chat)
    found = columns(datum)
    learnt = [t for t, w in zip(found["target_tokens"], found["weights"], strict=True) if w]
    turns = [message["content"] for message in chat if message["role"] == "assistant"]
    assert tokenizer.decode(learnt) == "".join(f"{turn}<|im_end|>\n" for turn in turns)
    call = chat[1]["content"].removeprefix("<call>").removesuffix("</call>")
    assert calculator(call) == chat[2]["content"]
    assert calculator("nonsense").startswith("error")
    assert calculator('{"tool": "divide", "numbers": [1, 0]}').startswith("error")


def test_an_answer_is_compared_with_the_others() -> None:
    from rloo import leave_one_out

    assert leave_one_out([1.0, 0.0, 0.5]) == pytest.approx([0.75, -0.75, 0.0])
    assert sum(leave_one_out([0.1, 0.9, 0.4, 0.2])) == pytest.approx(0)


def test_the_teachers_candidates_are_the_targets() -> None:
    from gkd import soft_datum

    half, tenth = math.log(0.5), math.log(0.1)
    top: Any = [None, [(1, half), (2, half)], [(5, half), (6, tenth), (7, tenth)], [(8, half)]]
    datum, entropy = soft_datum([3, 4, 5, 9], 2, top, 2)
    assert list(datum.loss_fn_inputs["target_tokens"].shape or []) == [3, 2]
    found = columns(datum)
    assert found["target_tokens"] == [0, 0, 5, 6, 8, 0]
    assert found["weights"] == pytest.approx([0, 0, 5 / 6, 1 / 6, 1, 0])
    assert entropy == pytest.approx(-(5 / 6) * math.log(5 / 6) - (1 / 6) * math.log(1 / 6))


def test_preferences_begin_at_ln_2_and_pull_apart() -> None:
    import torch
    from dpo import dpo_loss
    from shared import to_datum

    data = [to_datum([1, 2, 3], weights=[0.0, 1.0, 1.0]) for _ in range(4)]
    logprobs = [torch.full((2,), -1.0, requires_grad=True) for _ in data]
    loss, metrics = dpo_loss([torch.tensor(-2.0)] * 4)(data, logprobs)
    assert loss.item() == pytest.approx(math.log(2))
    assert metrics == {"accuracy": 0.0, "margin": 0.0}
    loss.backward()
    preferred, other = logprobs[0].grad, logprobs[1].grad
    assert preferred is not None
    assert other is not None
    assert (preferred < 0).all()
    assert torch.equal(other, -preferred)
