"""The GRPO example's own parts: its reward, its advantages, its datums, its order of requests."""

from __future__ import annotations

import statistics
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

EXAMPLES = Path(__file__).parent.parent.parent / "examples"


@pytest.fixture(autouse=True)
def _as_a_program(monkeypatch: pytest.MonkeyPatch) -> None:
    """grpo_async imports grpo, which lies beside it."""
    monkeypatch.syspath_prepend(str(EXAMPLES))


@pytest.fixture
def grpo() -> Any:
    import grpo

    return grpo


def test_the_reward_is_the_share_of_digits(grpo: Any) -> None:
    assert [grpo.reward(text) for text in ("", "ab", "1a", "2024")] == [0, 0, 0.5, 1]


def test_advantages_are_relative_to_the_group(grpo: Any) -> None:
    found = grpo.advantages([0.0, 0.5, 1.0])
    assert found[0] == -found[2] < 0
    assert found[1] == 0
    assert statistics.pstdev(found) == pytest.approx(1, rel=1e-3)
    assert grpo.advantages([0.3, 0.3]) == [0, 0]


def test_only_the_answer_has_an_advantage(grpo: Any) -> None:
    datum = grpo.to_datum([1, 2, 3], SimpleNamespace(tokens=[4, 5], logprobs=[-0.5, -0.25]), 2.0)
    assert datum.model_input.to_ints() == [1, 2, 3, 4]
    columns = {name: list(tensor.data) for name, tensor in datum.loss_fn_inputs.items()}
    assert columns == {
        "target_tokens": [2, 3, 4, 5],
        "logprobs": [0, 0, -0.5, -0.25],
        "advantages": [0, 0, 2, 2],
    }


def test_two_generations_of_samplers_are_in_flight(monkeypatch: pytest.MonkeyPatch) -> None:
    import grpo_async

    events: list[str] = []

    def ask_all(client: Any, tokenizer: Any, step: int, options: Any) -> str:
        events.append(f"ask {step}")
        return str(step)

    def learn(client: Any, tokenizer: Any, rollouts: str, loss: str, options: Any) -> float:
        events.append(f"learn {rollouts} by {loss}")
        return 0.5

    monkeypatch.setattr(grpo_async, "ask_all", ask_all)
    monkeypatch.setattr(grpo_async, "learn", learn)
    assert grpo_async.train(None, None, SimpleNamespace(steps=3)) == [0.5] * 3  # type: ignore[arg-type]
    assert events == [
        *("ask 0", "ask 1", "learn 0 by ppo"),
        *("ask 2", "learn 1 by ppo"),
        *("ask 3", "learn 2 by ppo"),
    ]
    assert "grpo" in sys.modules
