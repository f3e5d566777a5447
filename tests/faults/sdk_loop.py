"""A user's training loop that must never notice anything: ``python sdk_loop.py URL MODEL STEPS``.

Prints ``step N`` as it goes, so that a test knows when to strike, and at the end one JSON object: every loss,
what was sampled on the way, and the path of the final checkpoint.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import tinker
from tinker import types


def datum(shift: int) -> types.Datum:
    tokens = [5 + (shift * 7 + n * 3) % 300 for n in range(17)]
    inputs = {
        "target_tokens": types.TensorData(data=tokens[1:], dtype="int64", shape=[16]),
        "weights": types.TensorData(data=[1.0] * 16, dtype="float32", shape=[16]),
    }
    return types.Datum(model_input=types.ModelInput.from_ints(tokens[:-1]), loss_fn_inputs=inputs)


def sampled(run: Any) -> list[int]:
    client = run.save_weights_and_get_sampling_client()
    prompt = types.ModelInput.from_ints([5, 6, 7, 8])
    params = types.SamplingParams(max_tokens=6, temperature=0.0, stop=[])
    answer = client.sample(prompt=prompt, num_samples=1, sampling_params=params).result()
    return list(answer.sequences[0].tokens)


def main(url: str, model: str, steps: int) -> dict[str, Any]:
    service = tinker.ServiceClient(base_url=url, api_key="tml-faults")
    run = service.create_lora_training_client(base_model=model, rank=8, seed=1)
    losses, samples, waiting = [], [], []
    for step in range(steps):
        passes = run.forward_backward([datum(step), datum(step + 1)], "cross_entropy")
        waiting.append((passes, run.optim_step(types.AdamParams(learning_rate=1e-2))))
        while len(waiting) > (2 if step + 1 < steps else 0):
            one, two = waiting.pop(0)
            losses.append(one.result().metrics["loss:sum"])
            two.result()
        print(f"step {step}", flush=True)
        if step % 5 == 4:
            samples.append(sampled(run))
        if step % 7 == 6:
            run.save_state("latest", overwrite=True).result()
    path = run.save_state("final").result().path
    return {"losses": losses, "samples": samples, "path": path}


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1], sys.argv[2], int(sys.argv[3]))), flush=True)
