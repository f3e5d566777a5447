"""The same task as grpo.py, with sampling and training at the same time.

Two generations of samplers are in flight: while one step trains on the answers of the weights before last,
the next answers are being drawn already. They are a step stale, which PPO's clipped ratio allows for. Run it
like grpo.py, with the same options.
"""

from __future__ import annotations

import argparse
from collections import deque
from typing import Any

import tinker
from grpo import Rollouts, ask_all, learn, main
from tqdm import tqdm

IN_FLIGHT = 2


def train(client: tinker.TrainingClient, tokenizer: Any, options: argparse.Namespace) -> list[float]:
    """The mean reward of each step."""
    rewards: list[float] = []
    in_flight: deque[Rollouts] = deque()
    for step in (progress := tqdm(range(options.steps), unit="step", dynamic_ncols=True)):
        while len(in_flight) < IN_FLIGHT:
            in_flight.append(ask_all(client, tokenizer, step + len(in_flight), options))
        rewards.append(learn(client, tokenizer, in_flight.popleft(), "ppo", options))
        progress.set_postfix(reward=f"{rewards[-1]:.2f}")
    return rewards


if __name__ == "__main__":
    main(train)
