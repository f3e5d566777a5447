"""Reinforcement learning in a page: GRPO on a toy task, with rewards computed right here.

The model is asked for numbers, and an answer's reward is the share of digits in it. Each step samples a group
of answers to every prompt from the current weights, compares each answer with its group, and makes the better
ones likelier. Start a server (`twinkle-serve up deployments/local.yaml`), then

    python examples/grpo.py --base-url http://127.0.0.1:8000
"""

from __future__ import annotations

import argparse
import os
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import httpx
import matplotlib
import tinker
from tinker import types
from tqdm import tqdm

matplotlib.use("Agg")
from matplotlib import pyplot as plt

QUESTIONS = ["Count to ten.", "Tell me a long number.", "What is pi?", "Write down a year."]
Loss = Literal["importance_sampling", "ppo"]
Compare = Callable[[Sequence[float]], list[float]]
Rollouts = list[tuple[list[int], Any]]  # prompt, future of its group of answers


def reward(text: str) -> float:
    """The share of digits among the characters of an answer."""
    return sum(letter.isdigit() for letter in text) / max(1, len(text))


def advantages(rewards: Sequence[float]) -> list[float]:
    """How much better than its group each answer is, in standard deviations."""
    mean, spread = statistics.fmean(rewards), statistics.pstdev(rewards)
    return [(each - mean) / (spread + 1e-4) for each in rewards]


def to_datum(prompt: list[int], answer: Any, advantage: float) -> types.Datum:
    """Position t predicts token t + 1; only the answer's tokens have an advantage."""
    tokens, before = prompt + list(answer.tokens), len(prompt) - 1
    inputs = {
        "target_tokens": types.TensorData(data=tokens[1:], dtype="int64", shape=[len(tokens) - 1]),
        "logprobs": _floats([0.0] * before + list(answer.logprobs)),
        "advantages": _floats([0.0] * before + [advantage] * len(answer.tokens)),
    }
    return types.Datum(model_input=types.ModelInput.from_ints(tokens[:-1]), loss_fn_inputs=inputs)


def _floats(values: list[float]) -> types.TensorData:
    return types.TensorData(data=values, dtype="float32", shape=[len(values)])


def ask_all(
    client: tinker.TrainingClient, tokenizer: Any, step: int, options: argparse.Namespace
) -> Rollouts:
    """Freeze the weights as they are now and begin to sample from them; nothing is waited for here."""
    sampler = client.save_weights_and_get_sampling_client()
    rollouts: Rollouts = []
    for number, question in enumerate(QUESTIONS):
        chat = [{"role": "user", "content": question}]
        text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        prompt = tokenizer.encode(text, add_special_tokens=False)
        seed = options.seed + step * len(QUESTIONS) + number
        params = types.SamplingParams(max_tokens=options.max_tokens, seed=seed)
        future = sampler.sample(types.ModelInput.from_ints(prompt), options.group_size, params)
        rollouts.append((prompt, future))
    return rollouts


def learn(
    client: tinker.TrainingClient,
    tokenizer: Any,
    rollouts: Rollouts,
    loss: Loss,
    options: argparse.Namespace,
    compare: Compare = advantages,
) -> float:
    """One step on these answers; their mean reward. ``compare``: from a group's rewards to advantages."""
    data, rewards = [], []
    for prompt, future in rollouts:
        answers = future.result().sequences
        group = [reward(tokenizer.decode(each.tokens, skip_special_tokens=True)) for each in answers]
        rewards += group
        data += [to_datum(prompt, *pair) for pair in zip(answers, compare(group), strict=True)]
    backward = client.forward_backward(data, loss)
    step = client.optim_step(types.AdamParams(learning_rate=options.learning_rate, grad_clip_norm=1.0))
    backward.result()
    step.result()
    show(client, options, reward=statistics.fmean(rewards))
    return statistics.fmean(rewards)


def show(client: tinker.TrainingClient, options: argparse.Namespace, **metrics: float) -> None:
    """Have these drawn beside the loss in the server's console. Another server answers 404, and no harm."""
    url = f"{options.base_url}/api/v1/training_runs/{client.model_id}/metrics"
    key = os.environ.get("TINKER_API_KEY", "tml-local")
    httpx.post(url, json={"metrics": metrics}, headers={"X-API-Key": key}, timeout=60)


def train(
    client: tinker.TrainingClient, tokenizer: Any, options: argparse.Namespace, compare: Compare = advantages
) -> list[float]:
    """The mean reward of each step."""
    rewards: list[float] = []
    for step in (progress := tqdm(range(options.steps), unit="step", dynamic_ncols=True)):
        rollouts = ask_all(client, tokenizer, step, options)
        rewards.append(learn(client, tokenizer, rollouts, "importance_sampling", options, compare))
        progress.set_postfix(reward=f"{rewards[-1]:.2f}")
    return rewards


def parse_options(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Teach a model to answer in digits, by reward alone.")
    parser.add_argument("--base-url", default=os.environ.get("TINKER_BASE_URL", "http://127.0.0.1:8000"))
    parser.add_argument("--model", help="one of the server's models (default: its first)")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--group-size", type=int, default=16, help="answers to each question")
    parser.add_argument("--max-tokens", type=int, default=16, help="of an answer")
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("grpo-output"), help="where reward.png goes")
    return parser.parse_args(arguments)


Train = Callable[[tinker.TrainingClient, Any, argparse.Namespace], list[float]]


def main(train: Train = train) -> None:
    options = parse_options()
    # An open server takes any key, but the SDK itself insists on the prefix tml-.
    key = os.environ.get("TINKER_API_KEY", "tml-local")
    with tinker.ServiceClient(base_url=options.base_url, api_key=key) as service:
        model = options.model or service.get_server_capabilities().supported_models[0].model_name
        assert model is not None
        client = service.create_lora_training_client(model, rank=16, seed=options.seed).result()
        rewards = train(client, client.get_tokenizer(), options)
    options.output.mkdir(parents=True, exist_ok=True)
    figure, axes = plt.subplots(figsize=(6, 4))
    axes.plot(range(1, len(rewards) + 1), rewards, marker=".")
    axes.set(xlabel="step", ylabel="mean reward", title="Share of digits", ylim=(0, 1))
    figure.savefig(options.output / "reward.png", dpi=120)
    few = max(1, len(rewards) // 5)
    first, last = statistics.fmean(rewards[:few]), statistics.fmean(rewards[-few:])
    print(f"mean reward: {first:.3f} at first, {last:.3f} at last")


if __name__ == "__main__":
    main()
