"""Direct preference optimisation, by a loss of your own that runs on your machine.

Each pair has one question and two answers, of which the one in digits is preferred. The loss is the
published one: -log sigmoid(beta * (margin of the trained model - margin of the reference)), and
`forward_backward_custom` differentiates it here and sends the server only numbers. The reference is the
base model, which is what a fresh adapter computes: so the loss begins at ln 2 exactly. Start a server, then

    python examples/dpo.py --base-url http://127.0.0.1:8000
"""

from __future__ import annotations

import random
from typing import Any

import torch
from shared import Run, answer_tokens, connected, finish, options_for, prompt_tokens, to_datum
from tinker import types
from torch.nn.functional import logsigmoid
from tqdm import tqdm

WORDS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
BETA = 0.1


def pair(number: int) -> tuple[str, str, str]:
    """A question, the preferred answer and the other one; the same number gives the same pair."""
    digits = random.Random(number).sample(range(10), 4)
    preferred = " ".join(str(digit) for digit in digits)
    other = " ".join(WORDS[digit] for digit in digits)
    return f"Repeat these numbers: {', '.join(WORDS[digit] for digit in digits)}.", preferred, other


def datums(run: Run, numbers: range) -> list[types.Datum]:
    """The two answers of each pair, one after the other; weight 1 on an answer's tokens."""
    data = []
    for number in numbers:
        question, *answers = pair(number)
        prompt = prompt_tokens(run.tokenizer, question)
        for answer in answers:
            end = answer_tokens(run.tokenizer, answer)
            data.append(to_datum(prompt + end, weights=[0.0] * len(prompt) + [1.0] * len(end)))
    return data


def score(datum: types.Datum, logprobs: Any) -> torch.Tensor:
    """The logprob of the datum's answer."""
    weights = torch.tensor(datum.loss_fn_inputs["weights"].data)
    return (torch.as_tensor(logprobs) * weights).sum()


def reference_scores(run: Run, data: list[types.Datum]) -> list[torch.Tensor]:
    """What the model says before it is trained."""
    outputs = run.client.forward(data, "cross_entropy").result().loss_fn_outputs
    return [score(datum, each["logprobs"].data) for datum, each in zip(data, outputs, strict=True)]


def dpo_loss(reference: list[torch.Tensor]) -> Any:
    def loss(data: list[types.Datum], logprobs: list[torch.Tensor]) -> tuple[torch.Tensor, dict[str, float]]:
        scores = [score(*each) for each in zip(data, logprobs, strict=True)]
        gains = torch.stack(scores) - torch.stack(reference)
        margins = BETA * (gains[0::2] - gains[1::2])
        accuracy = (margins > 0).float().mean().item()
        return -logsigmoid(margins).mean(), {"accuracy": accuracy, "margin": margins.mean().item()}

    return loss


def main(arguments: list[str] | None = None) -> None:
    parser = options_for(__doc__, steps=30, learning_rate=5e-4)
    parser.add_argument("--batch-size", type=int, default=8, help="pairs a step")
    options = parser.parse_args(arguments)
    losses, margins = [], []
    with connected(options) as run:
        data = datums(run, range(4 * options.batch_size))
        reference = reference_scores(run, data)
        for step in (progress := tqdm(range(options.steps), unit="step", dynamic_ncols=True)):
            first = step % 4 * 2 * options.batch_size
            batch = slice(first, first + 2 * options.batch_size)
            backward = run.client.forward_backward_custom(data[batch], dpo_loss(reference[batch]))
            metrics = backward.result().metrics
            adam = types.AdamParams(learning_rate=options.learning_rate, grad_clip_norm=1.0)
            run.client.optim_step(adam).result()
            losses.append(metrics["loss:sum"])
            margins.append(metrics["margin"])
            progress.set_postfix(loss=f"{losses[-1]:.3f}", accuracy=f"{metrics['accuracy']:.2f}")
    print(f"loss before any step: {losses[0]:.6f}")
    finish("DPO", {"loss": losses, "margin": margins}, options)


if __name__ == "__main__":
    main()
