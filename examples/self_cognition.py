"""Teach a model who it is: a LoRA on about a hundred conversations, through the tinker SDK.

Start a server (`twinkle-serve up deployments/local.yaml`), then

    python examples/self_cognition.py --base-url http://127.0.0.1:8000 --name Twinkle

It asks "Who are you?", trains, saves the adapter after each epoch, asks again from the saved weights, and
draws the loss.
"""

from __future__ import annotations

import argparse
import json
import os
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import matplotlib
import tinker
from tinker import types
from tqdm import tqdm

matplotlib.use("Agg")
from matplotlib import pyplot as plt

DATA = Path(__file__).parent / "data" / "self_cognition.jsonl"
QUESTIONS = ["Who are you?", "你是谁？"]


def load_conversations(path: Path, name: str, author: str) -> list[dict[str, str]]:
    """One JSON object a line with `query` and `response`; {{NAME}} and {{AUTHOR}} are filled in."""
    text = path.read_text(encoding="utf-8").replace("{{NAME}}", name).replace("{{AUTHOR}}", author)
    return [json.loads(line) for line in text.splitlines()]


def chat_prompt(tokenizer: Any, question: str) -> list[int]:
    """The tokens after which the assistant's answer begins."""
    chat = [{"role": "user", "content": question}]
    text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    tokens: list[int] = tokenizer.encode(text, add_special_tokens=False)
    return tokens


def to_datum(tokenizer: Any, conversation: dict[str, str]) -> types.Datum:
    """Position t predicts token t + 1; only the answer and its end are learnt (the prompt weighs nothing)."""
    prompt = chat_prompt(tokenizer, conversation["query"])
    answer = tokenizer.encode(conversation["response"] + tokenizer.eos_token, add_special_tokens=False)
    tokens = prompt + answer
    weights = [0.0] * (len(prompt) - 1) + [1.0] * len(answer)
    return types.Datum(
        model_input=types.ModelInput.from_ints(tokens[:-1]),
        loss_fn_inputs={
            "target_tokens": types.TensorData(data=tokens[1:], dtype="int64", shape=[len(weights)]),
            "weights": types.TensorData(data=weights, dtype="float32", shape=[len(weights)]),
        },
    )


def ask(sampler: tinker.SamplingClient, tokenizer: Any, question: str) -> str:
    """The model's most likely answer."""
    params = types.SamplingParams(max_tokens=64, temperature=0.0, stop=[tokenizer.eos_token_id])
    prompt = types.ModelInput.from_ints(chat_prompt(tokenizer, question))
    result = sampler.sample(prompt=prompt, num_samples=1, sampling_params=params).result()
    answer: str = tokenizer.decode(result.sequences[0].tokens, skip_special_tokens=True)
    return answer.strip()


def shuffled_batches(data: list[types.Datum], size: int, seed: int) -> Iterator[list[types.Datum]]:
    order = random.Random(seed).sample(data, len(data))
    for start in range(0, len(order), size):
        yield order[start : start + size]


def train(
    client: tinker.TrainingClient, data: list[types.Datum], options: argparse.Namespace
) -> tuple[list[float], str]:
    """The loss per answer token of each step, and the path of the weights saved after the last epoch."""
    losses: list[float] = []
    saved = ""
    steps_per_epoch = -(-len(data) // options.batch_size)
    with tqdm(total=options.epochs * steps_per_epoch, unit="step", dynamic_ncols=True) as progress:
        for epoch in range(options.epochs):
            for batch in shuffled_batches(data, options.batch_size, seed=epoch):
                # Both requests are on their way before either is waited for.
                backward = client.forward_backward(batch, "cross_entropy")
                step = client.optim_step(types.AdamParams(learning_rate=options.learning_rate))
                learnt = sum(sum(datum.loss_fn_inputs["weights"].data) for datum in batch)
                losses.append(backward.result().metrics["loss:sum"] / learnt)
                step.result()
                progress.set_postfix(epoch=epoch, loss=f"{losses[-1]:.3f}")
                progress.update()
            saved = client.save_state(f"twinkle-lora-{epoch}").result().path
            progress.write(f"saved {saved}")
    return losses, saved


def draw(losses: list[float], path: Path) -> None:
    figure, axes = plt.subplots(figsize=(6, 4))
    axes.plot(range(1, len(losses) + 1), losses, marker=".")
    axes.set(xlabel="step", ylabel="loss per answer token (nats)", title="Self-cognition", ylim=(0, None))
    axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def parse_options(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Teach a model who it is.")
    parser.add_argument("--base-url", default=os.environ.get("TINKER_BASE_URL", "http://127.0.0.1:8000"))
    parser.add_argument("--model", help="one of the server's models (default: its first)")
    parser.add_argument("--name", default="Twinkle", help="what the model shall call itself")
    parser.add_argument("--author", default="the Twinkle team", help="who shall have trained it")
    parser.add_argument("--data", type=Path, default=DATA, help="JSON lines with query and response")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--output", type=Path, default=Path("demo-output"), help="where loss.png goes")
    return parser.parse_args(arguments)


def first_model(base_url: str, api_key: str) -> str:
    """The name of the first model that the server offers."""
    client = tinker.RestClient(base_url=base_url, api_key=api_key)
    models = client.get_server_capabilities().result().supported_models
    name = models[0].model_name
    assert name is not None
    return name


def run(service: tinker.ServiceClient, model: str, options: argparse.Namespace) -> None:
    client = service.create_lora_training_client(base_model=model, rank=16).result()
    tokenizer = client.get_tokenizer()
    base = service.create_sampling_client(base_model=model).result()
    before = [ask(base, tokenizer, question) for question in QUESTIONS]
    print(f"{model}, before: {QUESTIONS[0]}  {before[0]}", flush=True)

    conversations = load_conversations(options.data, options.name, options.author)
    losses, saved = train(client, [to_datum(tokenizer, each) for each in conversations], options)
    draw(losses, options.output / "loss.png")

    trained = service.create_sampling_client(model_path=saved).result()
    after = [ask(trained, tokenizer, question) for question in QUESTIONS]
    print(f"\nloss per answer token: {losses[0]:.2f} at first, {losses[-1]:.2f} at last")
    for question, old, new in zip(QUESTIONS, before, after, strict=True):
        print(f"\n{question}\n  before: {old}\n  after:  {new}")
    print(f"\nthe loss is drawn in {options.output / 'loss.png'}")


def main() -> None:
    options = parse_options()
    options.output.mkdir(parents=True, exist_ok=True)
    # An open server takes any key, but the SDK itself insists on the prefix tml-.
    api_key = os.environ.get("TINKER_API_KEY", "tml-local")
    model = options.model or first_model(options.base_url, api_key)
    with tinker.ServiceClient(base_url=options.base_url, api_key=api_key) as service:
        run(service, model, options)


if __name__ == "__main__":
    main()
