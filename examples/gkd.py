"""Generalised knowledge distillation: at every position the teacher's K likeliest tokens are the targets.

Each step takes half of its answers from the student and half from the teacher (lambda = 0.5), asks the
teacher for its top-K logprobs along them, and trains with cross entropy on targets of shape [N, K],
weighted by the teacher's probabilities: the forward KL up to a constant. Start a server, then

    python examples/gkd.py --base-url http://127.0.0.1:8000
"""

from __future__ import annotations

import argparse
import math

import tinker
from shared import Run, connected, finish, floats, options_for, prompt_tokens
from teacher import QUESTIONS, make_teacher
from tinker import types
from tqdm import tqdm

TopK = list[list[tuple[int, float]] | None]


def soft_datum(tokens: list[int], first: int, top: TopK, k: int) -> tuple[types.Datum, float]:
    """Position t predicts token t + 1, for which the teacher gives K candidates; those before the answer,
    which begins at ``first``, weigh nothing. Also the entropy that the weights have, in nats."""
    targets: list[int] = []
    weights: list[float] = []
    entropy = 0.0
    for position in range(1, len(tokens)):
        candidates = (top[position] or [])[:k] if position >= first else []
        candidates = candidates + [(0, -math.inf)] * (k - len(candidates))
        shares = [math.exp(logprob) for _, logprob in candidates]
        total = sum(shares) or 1.0
        targets += [token for token, _ in candidates]
        weights += [share / total for share in shares]
        entropy -= sum(share / total * math.log(share / total) for share in shares if share > 0)
    shape = [len(tokens) - 1, k]
    inputs = {
        "target_tokens": types.TensorData(data=targets, dtype="int64", shape=shape),
        "weights": floats(weights, *shape),
    }
    return types.Datum(model_input=types.ModelInput.from_ints(tokens[:-1]), loss_fn_inputs=inputs), entropy


def answers(
    run: Run, teacher: tinker.SamplingClient, step: int, options: argparse.Namespace
) -> list[tuple[list[int], int]]:
    """Whole conversations and where the answer begins: of the student and of the teacher."""
    found, asked = [], []
    for number, sampler in enumerate((run.sampler(), teacher)):
        for index, question in enumerate(QUESTIONS):
            prompt = prompt_tokens(run.tokenizer, question)
            seed = options.seed + 2 * (step * len(QUESTIONS) + index) + number
            params = types.SamplingParams(max_tokens=options.max_tokens, seed=seed)
            future = sampler.sample(types.ModelInput.from_ints(prompt), options.group_size, params)
            asked.append((prompt, future))
    for prompt, future in asked:
        found += [([*prompt, *each.tokens], len(prompt)) for each in future.result().sequences]
    return found


def main(arguments: list[str] | None = None) -> None:
    parser = options_for(__doc__, steps=25, learning_rate=1e-3)
    parser.add_argument("--teacher-steps", type=int, default=30)
    parser.add_argument(
        "--group-size", type=int, default=4, help="answers to each question and of each model"
    )
    parser.add_argument("--max-tokens", type=int, default=12, help="of an answer")
    parser.add_argument("--top-k", type=int, default=8)
    options = parser.parse_args(arguments)
    kls = []
    with connected(options) as run:
        teacher = make_teacher(run, options)
        one = types.SamplingParams(max_tokens=1)
        for step in (progress := tqdm(range(options.steps), unit="step", dynamic_ncols=True)):
            texts = answers(run, teacher, step, options)
            graded = [
                teacher.sample(types.ModelInput.from_ints(tokens), 1, one, topk_prompt_logprobs=options.top_k)
                for tokens, _ in texts
            ]
            pairs = [
                soft_datum(tokens, first, list(future.result().topk_prompt_logprobs or []), options.top_k)
                for (tokens, first), future in zip(texts, graded, strict=True)
            ]
            metrics = run.step([datum for datum, _ in pairs], "cross_entropy", options.learning_rate)
            num_tokens = sum(len(tokens) - first for tokens, first in texts)
            kls.append((metrics["loss:sum"] - sum(entropy for _, entropy in pairs)) / num_tokens)
            progress.set_postfix(kl=f"{kls[-1]:.3f}")
    finish("GKD", {"forward KL per token": kls}, options)


if __name__ == "__main__":
    main()
