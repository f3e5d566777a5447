"""RLOO: the task of grpo.py, with each answer compared to the mean of the *other* answers of its group.

Leaving an answer out of its own baseline keeps the estimate of the gradient unbiased, and nothing is
divided by a standard deviation, so groups that agree count little. Run it like grpo.py, with the same
options.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

import grpo
import tinker


def leave_one_out(rewards: Sequence[float]) -> list[float]:
    """How much better than the mean of the others of its group each answer is."""
    total, others = sum(rewards), len(rewards) - 1
    return [each - (total - each) / others for each in rewards]


def train(client: tinker.TrainingClient, tokenizer: Any, options: argparse.Namespace) -> list[float]:
    """The mean reward of each step."""
    return grpo.train(client, tokenizer, options, leave_one_out)


if __name__ == "__main__":
    grpo.main(train)
