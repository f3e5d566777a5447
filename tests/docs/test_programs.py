"""Programs of the guides, run with what they leave to the reader put in its place.

Knows the SDK's own types, no server: whether a whole program learns is for tests/e2e.
"""

from __future__ import annotations

import ast
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tinker import types
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

ROOT = Path(__file__).parents[2]


def programs_of(page: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", (ROOT / "docs" / page).read_text(), re.S | re.M)


@pytest.fixture
def begins_texts() -> PreTrainedTokenizerFast:
    """Puts <s> before every text, as those of Llama 3 and Mixtral do."""
    words = ["<s>", "Who", "are", "you", "?", "I", "am", "Twinkle", "."]
    tokenizer = Tokenizer(WordLevel({word: number for number, word in enumerate(words)}))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>")


def test_the_quickstarts_datum_begins_once(begins_texts: PreTrainedTokenizerFast) -> None:
    (program,) = programs_of("quickstart.md")
    (function,) = (node for node in ast.parse(program).body if isinstance(node, ast.FunctionDef))
    names: dict[str, Any] = {"tokenizer": begins_texts, "types": types}
    exec(ast.unparse(function), names)
    datum = names["datum"]("Who are you? ", "I am Twinkle.")
    inputs = {name: list(tensor.data) for name, tensor in datum.loss_fn_inputs.items()}
    assert begins_texts.decode(datum.model_input.to_ints()) == "<s> Who are you ? I am Twinkle"
    learnt = [t for t, w in zip(inputs["target_tokens"], inputs["weights"], strict=True) if w]
    assert begins_texts.decode(learnt) == "I am Twinkle ."


class Client:
    """Takes what the SDK's clients take; remembers what was sent and which answers were asked for."""

    def __init__(self) -> None:
        self.sent: dict[str, Any] = {}
        self.asked: set[str] = set()

    def save_weights_and_get_sampling_client(self) -> Any:
        return SimpleNamespace(sample=self._sample)

    def _sample(self, prompt: Any, num_samples: int, sampling_params: Any) -> Any:
        assert isinstance(prompt, types.ModelInput)
        assert isinstance(sampling_params, types.SamplingParams)
        answers = [SimpleNamespace(tokens=[7, 8 + n], logprobs=[-0.5, -0.25]) for n in range(num_samples)]
        return SimpleNamespace(result=lambda: SimpleNamespace(sequences=answers))

    def forward_backward(self, data: Any, loss: str) -> Any:
        return self._answer("forward_backward", (data, loss))

    def optim_step(self, params: Any) -> Any:
        return self._answer("optim_step", params)

    def _answer(self, name: str, what: Any) -> Any:
        self.sent[name] = what
        return SimpleNamespace(result=lambda: self.asked.add(name))


def test_the_step_of_grpo_runs_with_the_examples_datums() -> None:
    from examples.grpo import to_datum

    (program,) = programs_of("rl.md")
    client = Client()
    tokenizer = SimpleNamespace(decode=lambda tokens: str(tokens[-1]))
    prompts = [[1, 2, 3], [4, 5]]
    names = {"client": client, "tokenizer": tokenizer, "prompts": prompts, "types": types}
    exec(program, names | {"reward": float, "to_datum": to_datum})
    data, loss = client.sent["forward_backward"]
    assert loss == "importance_sampling"
    assert [datum.model_input.to_ints() for datum in data] == [
        [*prompt, 7] for prompt in prompts for _ in range(8)
    ]
    assert client.asked == {"forward_backward", "optim_step"}, "an error of the other would not be seen"
