"""Users' training loops that must never notice anything: ``python sdk_loop.py URL MODEL PROGRAM STEPS``.

PROGRAM: ``sft`` sends step after step ahead of the answers and looks now and then at what its model says,
``rl`` samples, scores and learns in turn. Prints ``step N`` as it goes, so that a test knows when to strike,
and at the end one JSON object: every loss, what was sampled on the way, and the path of the final checkpoint.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import tinker
from tinker import types

ADAM = types.AdamParams(learning_rate=1e-2)
PROMPT = [5, 6, 7, 8]


def row(tokens: list[int], **inputs: list[float]) -> types.Datum:
    """Learn tokens[1:] from what stands before them."""
    tensors = {
        name: types.TensorData(data=values, dtype="float32", shape=[len(values)])
        for name, values in inputs.items()
    }
    targets = types.TensorData(data=tokens[1:], dtype="int64", shape=[len(tokens) - 1])
    return types.Datum(
        model_input=types.ModelInput.from_ints(tokens[:-1]),
        loss_fn_inputs={"target_tokens": targets, **tensors},
    )


def text(shift: int) -> types.Datum:
    return row([5 + (shift * 7 + n * 3) % 300 for n in range(17)], weights=[1.0] * 16)


def draw(run: Any, seed: int) -> list[tuple[list[int], list[float]]]:
    """Freeze the weights as they are, and sample from them: tokens and their logprobs."""
    client = run.save_weights_and_get_sampling_client().result()
    params = types.SamplingParams(max_tokens=6, temperature=1.0, stop=[], seed=seed)
    prompt = types.ModelInput.from_ints(PROMPT)
    answer = client.sample(prompt=prompt, num_samples=2, sampling_params=params).result()
    return [(list(each.tokens), list(each.logprobs)) for each in answer.sequences]


def sft(run: Any, steps: int) -> tuple[list[float], list[Any]]:
    losses, waiting, samples = [], [], []
    for step in range(steps):
        passes = run.forward_backward([text(step), text(step + 1)], "cross_entropy")
        waiting.append((passes, run.optim_step(ADAM)))
        while len(waiting) > (2 if step + 1 < steps else 0):
            one, two = waiting.pop(0)
            losses.append(one.result().metrics["loss:sum"])
            two.result()
        print(f"step {step}", flush=True)
        if step % 7 == 6:
            run.save_state("latest", overwrite=True).result()
            samples.append(draw(run, step))
    return losses, [*samples, draw(run, steps)]


def rl(run: Any, steps: int) -> tuple[list[float], list[Any]]:
    """Reward even tokens."""
    losses, samples = [], []
    before = [0.0] * (len(PROMPT) - 1)
    for step in range(steps):
        drawn = draw(run, step)
        rewards = [sum(token % 2 == 0 for token in tokens) / len(tokens) for tokens, _ in drawn]
        data = [
            row(
                PROMPT + tokens,
                logprobs=before + logprobs,
                advantages=before + [reward - 0.5] * len(tokens),
            )
            for (tokens, logprobs), reward in zip(drawn, rewards, strict=True)
        ]
        passes, stepped = run.forward_backward(data, "importance_sampling"), run.optim_step(ADAM)
        losses.append(passes.result().metrics["loss:sum"])
        stepped.result()
        samples.append(drawn)
        print(f"step {step}", flush=True)
        if step % 4 == 3:
            run.save_state("latest", overwrite=True).result()
    return losses, samples


PROGRAMS = {"sft": sft, "rl": rl}


def main(url: str, model: str, program: str, steps: int) -> dict[str, Any]:
    with tinker.ServiceClient(base_url=url, api_key=f"tml-{program}") as service:
        run = service.create_lora_training_client(base_model=model, rank=8, seed=1).result()
        losses, samples = PROGRAMS[program](run, steps)
        path = run.save_state("final").result().path
    return {"losses": losses, "samples": samples, "path": path}


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4]))), flush=True)
