"""The examples' own arithmetic: masks, baselines, soft targets, preferences."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
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
    from agentic_sft import calculator, conversation, masked_datums

    chat = conversation(3)
    (datum,) = masked_datums(tokenizer, chat)
    turns = [message["content"] for message in chat if message["role"] == "assistant"]
    assert learnt(tokenizer, datum) == "".join(f"{turn}<|im_end|>" for turn in turns)
    call = chat[1]["content"].removeprefix("<call>").removesuffix("</call>")
    assert calculator(call) == chat[2]["content"]
    assert calculator("nonsense").startswith("error")
    assert calculator('{"tool": "divide", "numbers": [1, 0]}').startswith("error")


def learnt(tokenizer: PreTrainedTokenizerFast, datum: Any) -> str:
    found = columns(datum)
    return tokenizer.decode([t for t, w in zip(found["target_tokens"], found["weights"], strict=True) if w])


# Like Qwen3's: the last turn of the assistant, and no other, begins with what it thought, here nothing.
THINKS_LAST = """{% for message in messages -%}
<|im_start|>{{ message['role'] + '\n' }}
{%- if message['role'] == 'assistant' and loop.last %}{{ '<think>\n\n</think>\n\n' }}{% endif -%}
{{ message['content'] + '<|im_end|>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""

# Leaves out what the assistant said before.
FORGETS = """{% for message in messages if message['role'] != 'assistant' -%}
{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""


@pytest.mark.parametrize(("template", "num_datums"), [(THINKS_LAST, 1), (FORGETS, 2)])
def test_each_turn_is_learnt_behind_the_prompt_it_is_asked_with(
    tiny_llama: Path, template: str, num_datums: int
) -> None:
    from agentic_sft import conversation, masked_datums

    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    tokenizer.chat_template = template
    chat = conversation(3)
    data = masked_datums(tokenizer, chat)
    assert len(data) == num_datums
    call, answer = (f"{chat[turn]['content']}<|im_end|>" for turn in (1, 3))
    assert "".join(learnt(tokenizer, datum) for datum in data) == call + answer
    wholes = [[*datum.model_input.to_ints(), int(columns(datum)["target_tokens"][-1])] for datum in data]
    for turn, whole, said in ((1, wholes[0], call), (3, wholes[-1], answer)):
        prompt = tokenizer.apply_chat_template(chat[:turn], tokenize=False, add_generation_prompt=True)
        assert tokenizer.decode(whole).startswith(prompt + said)


def test_an_answer_counts_as_right_whatever_was_thought_before_it(tokenizer: PreTrainedTokenizerFast) -> None:
    from agentic_sft import conversation, let_loose

    chat = conversation(7)
    script = iter([chat[1]["content"], f"<think>\n\n</think>\n\n{chat[3]['content']}", "<think>It is"])

    def sample(prompt: Any, num_samples: int, params: Any) -> Any:
        tokens = tokenizer.encode(next(script), add_special_tokens=False)
        return SimpleNamespace(result=lambda: SimpleNamespace(sequences=[SimpleNamespace(tokens=tokens)]))

    run: Any = SimpleNamespace(tokenizer=tokenizer, sampler=lambda: SimpleNamespace(sample=sample))
    assert let_loose(run, range(7, 9)) == 1


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
