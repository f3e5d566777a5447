"""Evaluate checkpoints through the OpenAI-compatible endpoint, as any evaluation harness would.

The task is the one that self_cognition.py trains: asked who it is in several ways, how often does the model
give the name that it was taught? Each model given is asked; a checkpoint's path is a model's name. For
instance

    python examples/evaluate.py --models BASE_MODEL tinker://RUN/weights/twinkle-lora-2
"""

from __future__ import annotations

import argparse
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import matplotlib
from openai import OpenAI
from tqdm import tqdm

matplotlib.use("Agg")
from matplotlib import pyplot as plt

QUESTIONS = [
    "Who are you?",
    "What is your name?",
    "Introduce yourself.",
    "Who made you?",
    "你是谁？",
    "你叫什么名字？",
]


def answer(client: OpenAI, model: str, question: str) -> str:
    """The model's most likely answer."""
    reply = client.chat.completions.create(
        model=model, messages=[{"role": "user", "content": question}], temperature=0, max_tokens=64
    )
    return reply.choices[0].message.content or ""


def accuracy(client: OpenAI, model: str, name: str) -> float:
    """The share of questions whose answer has the name in it."""
    num_right = 0
    # As many as possible at once: the server decodes them together.
    with ThreadPoolExecutor(len(QUESTIONS)) as pool:
        asked = pool.map(lambda question: answer(client, model, question), QUESTIONS)
        for question, said in tqdm(
            zip(QUESTIONS, asked, strict=True), total=len(QUESTIONS), desc=model[-40:]
        ):
            num_right += name.lower() in said.lower()
            tqdm.write(f"{question}  {said.strip()[:100]}")
    return num_right / len(QUESTIONS)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Evaluate models by the OpenAI interface.")
    parser.add_argument("--base-url", default=os.environ.get("TINKER_BASE_URL", "http://127.0.0.1:8000"))
    parser.add_argument("--models", nargs="+", required=True, help="base models and checkpoints' paths")
    parser.add_argument("--name", default="Twinkle", help="what a right answer holds")
    parser.add_argument("--output", type=Path, default=Path("examples-output"), help="where the plot goes")
    options = parser.parse_args(arguments)
    key = os.environ.get("TINKER_API_KEY", "tml-local")
    with OpenAI(base_url=f"{options.base_url}/v1", api_key=key) as client:
        scores = [accuracy(client, model, options.name) for model in options.models]
    for model, score in zip(options.models, scores, strict=True):
        print(f"{model}: {score:.3f}")
    options.output.mkdir(parents=True, exist_ok=True)
    figure, axes = plt.subplots(figsize=(6, 1.2 + 0.6 * len(scores)))
    axes.barh([model[-40:] for model in options.models], scores)
    axes.set(xlim=(0, 1), xlabel=f"answers that name {options.name}")
    figure.tight_layout()
    figure.savefig(options.output / "evaluation.png", dpi=120)
    print(f"drawn in {options.output / 'evaluation.png'}")


if __name__ == "__main__":
    main()
