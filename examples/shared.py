"""What the examples share: options, the connection, datums, one training step, and the plot at the end."""

from __future__ import annotations

import argparse
import os
import statistics
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import tinker
from tinker import types

matplotlib.use("Agg")
from matplotlib import pyplot as plt

# The SDK renames its ways to ask for results from release to release; the old ones still work.
warnings.filterwarnings("ignore", category=FutureWarning, module="tinker")


@dataclass
class Run:
    """A session on a server with a fresh adapter to train."""

    service: tinker.ServiceClient
    client: tinker.TrainingClient
    tokenizer: Any
    model: str

    def step(self, data: list[types.Datum], loss: Any, learning_rate: float) -> dict[str, float]:
        """forward_backward and optim_step, both on their way before either is waited for; the metrics."""
        backward = self.client.forward_backward(data, loss)
        step = self.client.optim_step(types.AdamParams(learning_rate=learning_rate, grad_clip_norm=1.0))
        metrics = dict(backward.result().metrics)
        step.result()
        return metrics

    def sampler(self) -> tinker.SamplingClient:
        """Samples from the weights as they are now."""
        return self.client.save_weights_and_get_sampling_client().result()


def options_for(text: str, *, steps: int, learning_rate: float) -> argparse.ArgumentParser:
    """The options that every example has; ``text`` is its docstring."""
    parser = argparse.ArgumentParser(description=text.strip().splitlines()[0])
    parser.add_argument("--base-url", default=os.environ.get("TINKER_BASE_URL", "http://127.0.0.1:8000"))
    parser.add_argument("--model", help="one of the server's models (default: its first)")
    parser.add_argument("--steps", type=int, default=steps)
    parser.add_argument("--learning-rate", type=float, default=learning_rate)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("examples-output"), help="where the plot goes")
    return parser


@contextmanager
def connected(options: argparse.Namespace) -> Iterator[Run]:
    # An open server takes any key, but the SDK itself insists on the prefix tml-.
    key = os.environ.get("TINKER_API_KEY", "tml-local")
    with tinker.ServiceClient(base_url=options.base_url, api_key=key) as service:
        model = options.model or service.get_server_capabilities().supported_models[0].model_name
        assert model is not None
        client = service.create_lora_training_client(model, rank=16, seed=options.seed).result()
        yield Run(service, client, client.get_tokenizer(), model)


def prompt_tokens(tokenizer: Any, question: str) -> list[int]:
    """The tokens after which the assistant's answer begins."""
    chat = [{"role": "user", "content": question}]
    text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    tokens: list[int] = tokenizer.encode(text, add_special_tokens=False)
    return tokens


def answer_tokens(tokenizer: Any, answer: str) -> list[int]:
    """An answer and its end."""
    tokens: list[int] = tokenizer.encode(answer + tokenizer.eos_token, add_special_tokens=False)
    return tokens


def to_datum(tokens: Sequence[int], **columns: Sequence[float]) -> types.Datum:
    """Position t predicts token t + 1. ``columns``: a number for each token, of which the first token's,
    which nothing predicts, is dropped: weights, advantages, logprobs, ..."""
    assert all(len(values) == len(tokens) for values in columns.values())
    inputs = {name: floats(values[1:]) for name, values in columns.items()}
    inputs["target_tokens"] = types.TensorData(data=list(tokens[1:]), dtype="int64", shape=[len(tokens) - 1])
    return types.Datum(model_input=types.ModelInput.from_ints(list(tokens[:-1])), loss_fn_inputs=dict(inputs))


def floats(values: Sequence[float], *shape: int) -> types.TensorData:
    return types.TensorData(data=list(values), dtype="float32", shape=list(shape) or [len(values)])


def decoded(tokenizer: Any, tokens: Sequence[int]) -> str:
    text: str = tokenizer.decode(tokens, skip_special_tokens=True)
    return text


def finish(title: str, series: Mapping[str, Sequence[float]], options: argparse.Namespace) -> None:
    """Draw each curve, and print what it was in its first and in its last fifth."""
    options.output.mkdir(parents=True, exist_ok=True)
    figure, plots = plt.subplots(1, len(series), figsize=(5 * len(series), 3.6), squeeze=False)
    for axes, (name, values) in zip(plots[0], series.items(), strict=True):
        axes.plot(range(1, len(values) + 1), values, marker=".")
        axes.set(xlabel="step", ylabel=name, title=title)
        axes.grid(alpha=0.3)
        few = max(1, len(values) // 5)
        first, last = statistics.fmean(values[:few]), statistics.fmean(values[-few:])
        print(f"{name}: {first:.3f} at first, {last:.3f} at last", flush=True)
    figure.tight_layout()
    path = options.output / f"{title.lower().replace(' ', '_')}.png"
    figure.savefig(path, dpi=120)
    plt.close(figure)
    print(f"drawn in {path}")
