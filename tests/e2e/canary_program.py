"""A user's program that does work and some things wrong: ``python canary_program.py URL MODEL [BASE OUT]``.

With BASE and OUT, a base model's directory and a new one, it also takes what it trained to the cookbook's
tools. Takes its key from TINKER_API_KEY. Prints one JSON object of what it saw.
"""

from __future__ import annotations

import json
import sys
import traceback
from typing import Any

import tinker
from tinker import types

PROMPT = list(range(5, 21))


def datum() -> types.Datum:
    inputs = {"target_tokens": types.TensorData(data=PROMPT[1:], dtype="int64", shape=[len(PROMPT) - 1])}
    return types.Datum(model_input=types.ModelInput.from_ints(PROMPT[:-1]), loss_fn_inputs=inputs)


def failures(service: tinker.ServiceClient, client: tinker.TrainingClient) -> list[str]:
    """What the server says to nonsense, with the traceback as a user would log it."""
    wrong = (
        lambda: client.forward_backward([datum()], "no_such_loss").result(),  # type: ignore[arg-type]
        lambda: client.load_state("tinker://nobody/weights/a").result(),
        lambda: service.create_sampling_client(model_path="tinker://nobody/weights/a").result(),
        lambda: service.create_lora_training_client(base_model="gpt-5", rank=8).result(),
        lambda: tinker.RestClient().get_training_run("nobody").result(),
    )
    seen = []
    for attempt in wrong:
        try:
            attempt()
        except Exception:
            seen.append(traceback.format_exc())
    assert len(seen) == len(wrong), seen
    return seen


def main(url: str, model: str, base: str = "", out: str = "") -> dict[str, Any]:
    service = tinker.ServiceClient(base_url=url, user_metadata={"team": "blue"})
    client = service.create_lora_training_client(base_model=model, rank=8, seed=1).result()
    for _ in range(3):
        client.forward_backward([datum()], "cross_entropy")
        client.optim_step(types.AdamParams(learning_rate=1e-2)).result()
    state = client.save_state("state").result().path
    sampler = client.save_weights_for_sampler("sampler").result().path
    sampling = service.create_sampling_client(model_path=sampler).result()
    sampling.sample(types.ModelInput.from_ints(PROMPT), 1, types.SamplingParams(max_tokens=4)).result()
    seen = {"state": state, "sampler": sampler, "failures": failures(service, client)}
    client = service.create_training_client_from_state(state).result()
    (output,) = client.forward([datum()], "cross_entropy").result().loss_fn_outputs
    seen["logprobs"] = list(output["logprobs"].data)
    if out:
        from tinker_cookbook import weights

        adapter = weights.download(tinker_path=state, output_dir=f"{out}/adapter", base_url=url)
        weights.build_lora_adapter(base_model=base, adapter_path=adapter, output_path=f"{out}/lora")
        weights.build_hf_model(
            base_model=base, adapter_path=adapter, output_path=f"{out}/merged", dtype="float32"
        )
    service.close("success").result()
    return seen


if __name__ == "__main__":
    print(json.dumps(main(*sys.argv[1:])))
