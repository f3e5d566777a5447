"""Teach a random model just enough that the recipes have something to reward, and print where it is saved.

    python taught.py BASE_URL MODEL

A model that never says a number earns nothing, all advantages are 0, and a recipe of reinforcement learning
would exit cleanly without having trained. This one, asked as the recipes ask, gives numbers of several kinds:
in a box or not, ended in time or not, so rewards differ. Runs with the cookbook's Python and renders with its
code. Knows the form of the questions. Does not know the recipes.
"""

from __future__ import annotations

import random
import sys

import tinker
from tinker import types
from tinker_cookbook import model_info, renderers
from tinker_cookbook.recipes.math_rl.arithmetic_env import ArithmeticEnv
from tinker_cookbook.recipes.math_rl.math_env import Gsm8kDataset, MathEnv
from tinker_cookbook.supervised.data import conversation_to_datum
from tinker_cookbook.tokenizer_utils import get_tokenizer

STEPS, BATCH = 80, 12


def conversation(choose: random.Random) -> list[renderers.Message]:
    """A question as the recipes ask it, and an answer that is worth something now and then."""
    a, b = choose.randint(2, 9), choose.randint(3, 8)
    if choose.random() < 0.3:
        question, before = f"What is {a} + {b}?", ArithmeticEnv.standard_fewshot_prefix()
        answers = [str(choose.randint(5, 150)), str(a + b), f"It is {a + b} together."]
    else:
        question = f"What is {a} and {b} together?{Gsm8kDataset.question_suffix()}"
        before = MathEnv.standard_fewshot_prefix()
        answers = [f"\\boxed{{{choose.randint(5, 8)}}}"] * 6 + [str(choose.randint(5, 8))]
    return [
        *before,
        {"role": "user", "content": question},
        {"role": "assistant", "content": choose.choice(answers)},
    ]


def main(base_url: str, model: str) -> None:
    renderer = renderers.get_renderer(model_info.get_recommended_renderer_name(model), get_tokenizer(model))
    choose = random.Random(0)
    last = renderers.TrainOnWhat.LAST_ASSISTANT_MESSAGE
    with tinker.ServiceClient(base_url=base_url) as service:
        client = service.create_lora_training_client(model, rank=8, seed=0).result()
        for step in range(STEPS):
            adam = types.AdamParams(learning_rate=1e-2 * (1 - step / STEPS), grad_clip_norm=1.0)
            batch = [conversation_to_datum(conversation(choose), renderer, None, last) for _ in range(BATCH)]
            backward = client.forward_backward(batch, "cross_entropy")
            client.optim_step(adam).result()
            print(f"loss {backward.result().metrics['loss:sum'] / BATCH:.3f}", file=sys.stderr)
        print(client.save_state("taught").result().path)


if __name__ == "__main__":
    main(*sys.argv[1:])
