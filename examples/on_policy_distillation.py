"""On-policy distillation: the student answers, the teacher grades every token of it.

A token's advantage is the teacher's logprob less the student's, so a step along it lowers the reverse KL,
KL(student || teacher), on what the student itself says. Sampling gives the student's logprobs, and
`compute_logprobs` on the teacher's sampling client gives the teacher's. Start a server, then

    python examples/on_policy_distillation.py --base-url http://127.0.0.1:8000
"""

from __future__ import annotations

import argparse
import statistics

import tinker
from shared import Run, connected, finish, options_for, prompt_tokens, to_datum
from teacher import QUESTIONS, make_teacher
from tinker import types
from tqdm import tqdm


def graded_answers(
    run: Run, teacher: tinker.SamplingClient, step: int, options: argparse.Namespace
) -> tuple[list[types.Datum], float]:
    """A datum for each answer of the student as it is now, and their mean reverse KL per token."""
    sampler = run.sampler()
    prompts = [prompt_tokens(run.tokenizer, question) for question in QUESTIONS]
    asked = []
    for number, prompt in enumerate(prompts):
        seed = options.seed + step * len(prompts) + number
        params = types.SamplingParams(max_tokens=options.max_tokens, seed=seed)
        asked.append(sampler.sample(types.ModelInput.from_ints(prompt), options.group_size, params))
    answers = [
        (prompt, sequence)
        for prompt, future in zip(prompts, asked, strict=True)
        for sequence in future.result().sequences
    ]
    wholes = [types.ModelInput.from_ints([*prompt, *sequence.tokens]) for prompt, sequence in answers]
    grades = [teacher.compute_logprobs(whole) for whole in wholes]
    data, kls = [], []
    for (prompt, sequence), grade in zip(answers, grades, strict=True):
        student = list(sequence.logprobs or [])
        by_teacher = grade.result()[len(prompt) :]
        gains = [float(theirs or 0.0) - own for theirs, own in zip(by_teacher, student, strict=True)]
        kls += [-gain for gain in gains]
        before = [0.0] * len(prompt)
        tokens = [*prompt, *sequence.tokens]
        data.append(to_datum(tokens, logprobs=before + student, advantages=before + gains))
    return data, statistics.fmean(kls)


def main(arguments: list[str] | None = None) -> None:
    parser = options_for(__doc__, steps=30, learning_rate=1e-3)
    parser.add_argument("--teacher-steps", type=int, default=30)
    parser.add_argument("--group-size", type=int, default=8, help="answers to each question")
    parser.add_argument("--max-tokens", type=int, default=12, help="of an answer")
    options = parser.parse_args(arguments)
    kls = []
    with connected(options) as run:
        teacher = make_teacher(run, options)
        for step in (progress := tqdm(range(options.steps), unit="step", dynamic_ncols=True)):
            data, kl = graded_answers(run, teacher, step, options)
            run.step(data, "importance_sampling", options.learning_rate)
            kls.append(kl)
            progress.set_postfix(kl=f"{kl:.3f}")
    finish("On-policy distillation", {"reverse KL per token": kls}, options)


if __name__ == "__main__":
    main()
