"""A teacher for the two distillation examples: an adapter of the same model, taught to answer in digits.

Knows how it is made: by a few steps on made-up answers. A real teacher is a larger model that the same server
holds, and then only its sampling client is needed.
"""

from __future__ import annotations

import argparse
import random

import tinker
from shared import Run, answer_tokens, prompt_tokens, to_datum
from tqdm import tqdm

QUESTIONS = ["Count to ten.", "Tell me a long number.", "What is pi?", "Write down a year."]


def digits(number: int) -> str:
    return str(random.Random(number).randrange(10**7, 10**8))


def make_teacher(run: Run, options: argparse.Namespace) -> tinker.SamplingClient:
    """A run of its own, trained and frozen."""
    client = run.service.create_lora_training_client(run.model, rank=8, seed=options.seed + 1).result()
    own = Run(run.service, client, run.tokenizer, run.model)
    for step in tqdm(range(options.teacher_steps), desc="teacher", dynamic_ncols=True):
        data = []
        for number, question in enumerate(QUESTIONS):
            prompt = prompt_tokens(run.tokenizer, question)
            answer = answer_tokens(run.tokenizer, digits(len(QUESTIONS) * step + number))
            data.append(to_datum(prompt + answer, weights=[0.0] * len(prompt) + [1.0] * len(answer)))
        own.step(data, "cross_entropy", options.learning_rate)
    return own.sampler()
