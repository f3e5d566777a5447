"""Continued pre-training on plain text: every token of a page is learnt, and unseen pages get likelier.

The text is made here: pages of a harbour's log, all written after one pattern and no two alike. Pages that
are never trained on are scored after each step. Start a server, then

    python examples/pretraining.py --base-url http://127.0.0.1:8000
"""

from __future__ import annotations

import random

from shared import Run, connected, finish, options_for, to_datum
from tinker import types
from tqdm import tqdm

WINDS = ["north", "north-east", "east", "south", "west", "north-west"]
SHIPS = ["Anna", "Boreas", "Concordia", "Dolfijn", "Esperanza", "Fram", "Gloria"]
GOODS = ["salt", "timber", "herring", "wool", "copper", "tea"]


def page(number: int) -> str:
    """One page of the log; the same number gives the same page."""
    choose = random.Random(number)
    lines = [f"Day {number}. Wind {choose.choice(WINDS)}, force {choose.randint(1, 9)}."]
    for _ in range(3):
        ship, goods, tons = choose.choice(SHIPS), choose.choice(GOODS), choose.randint(2, 60)
        lines.append(f"The {ship} arrived with {tons} tons of {goods}.")
    return "\n".join(lines) + "\n"


def documents(run: Run, numbers: range) -> list[types.Datum]:
    """Each page whole: there is no prompt, so every position weighs 1."""
    data = []
    for number in numbers:
        tokens = [*run.tokenizer.encode(page(number), add_special_tokens=False), run.tokenizer.eos_token_id]
        data.append(to_datum(tokens, weights=[1.0] * len(tokens)))
    return data


def per_token(metrics: dict[str, float]) -> float:
    return metrics["loss:sum"] / metrics["weight:sum"]


def main(arguments: list[str] | None = None) -> None:
    parser = options_for(__doc__, steps=30, learning_rate=1e-3)
    parser.add_argument("--batch-size", type=int, default=8, help="pages a step")
    options = parser.parse_args(arguments)
    losses, unseen_losses = [], []
    with connected(options) as run:
        unseen = documents(run, range(10_000, 10_008))
        for step in (progress := tqdm(range(options.steps), unit="step", dynamic_ncols=True)):
            first = step * options.batch_size
            batch = documents(run, range(first, first + options.batch_size))
            losses.append(per_token(run.step(batch, "cross_entropy", options.learning_rate)))
            score = run.client.forward(unseen, "cross_entropy").result()
            unseen_losses.append(per_token(dict(score.metrics)))
            progress.set_postfix(loss=f"{losses[-1]:.3f}", unseen=f"{unseen_losses[-1]:.3f}")
        run.client.save_state("pretraining").result()
    finish("Pretraining", {"loss per token": losses, "unseen loss per token": unseen_losses}, options)


if __name__ == "__main__":
    main()
