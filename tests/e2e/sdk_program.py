"""A user's program against a running server, with the real SDK: ``python sdk_program.py URL MODEL_NAME``.

Knows only what the SDK's documentation says. Prints one JSON object of what it saw, for a test to judge.
Touches everything once: create, train, forward, custom loss, save and load of both kinds, sample,
compute_logprobs, list, publish, delete.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import tinker
import torch
from tinker import types

PROMPT = list(range(5, 21))
RANK = 8


def datum(tokens: list[int]) -> types.Datum:
    inputs = {
        "target_tokens": types.TensorData(data=tokens[1:], dtype="int64", shape=[len(tokens) - 1]),
        "weights": types.TensorData(data=[1.0] * (len(tokens) - 1), dtype="float32", shape=[len(tokens) - 1]),
    }
    return types.Datum(model_input=types.ModelInput.from_ints(tokens[:-1]), loss_fn_inputs=inputs)


def train(client: tinker.TrainingClient, steps: int) -> list[float]:
    """Pipelined steps on one datum; the losses."""
    futures = []
    for _ in range(steps):
        futures.append(client.forward_backward([datum(PROMPT)], "cross_entropy"))
        client.optim_step(types.AdamParams(learning_rate=1e-2))
    return [future.result().metrics["loss:sum"] for future in futures]


def loss_of(client: tinker.TrainingClient) -> float:
    return client.forward([datum(PROMPT)], "cross_entropy").result().metrics["loss:sum"]


def logprobs_of(client: tinker.TrainingClient) -> list[float]:
    (output,) = client.forward([datum(PROMPT)], "cross_entropy").result().loss_fn_outputs
    return list(output["logprobs"].data)


def squared(data: list[types.Datum], logprobs: list[torch.Tensor]) -> tuple[torch.Tensor, dict[str, float]]:
    loss = sum((row**2).sum() for row in logprobs)
    assert isinstance(loss, torch.Tensor)
    return loss, {"squared:sum": float(loss.detach())}


def built(client: Any) -> Any:
    """The client behind the future that newer SDKs return from ``create_*``."""
    return client.result() if hasattr(client, "result") else client


def sample(client: tinker.SamplingClient) -> dict[str, Any]:
    params = types.SamplingParams(max_tokens=8, temperature=0.0, stop=[])
    response = client.sample(
        types.ModelInput.from_ints(PROMPT), num_samples=2, sampling_params=params
    ).result()
    return {
        "tokens": [list(sequence.tokens) for sequence in response.sequences],
        "scored": client.compute_logprobs(types.ModelInput.from_ints(PROMPT)).result(),
    }


def names(client: tinker.TrainingClient, rest: Any) -> list[str]:
    listed = rest.list_checkpoints(client.model_id).result().checkpoints
    return sorted(checkpoint.checkpoint_id for checkpoint in listed)


def main(url: str, model: str) -> dict[str, Any]:
    service = tinker.ServiceClient(base_url=url, api_key="tml-e2e")
    seen: dict[str, Any] = {
        "models": [m.model_name for m in service.get_server_capabilities().supported_models],
    }
    run = built(service.create_lora_training_client(base_model=model, rank=RANK, seed=1))
    seen["base_loss"] = loss_of(run)
    seen["base_sample"] = sample(built(service.create_sampling_client(base_model=model)))
    seen["losses"] = train(run, 4)
    seen["custom"] = dict(run.forward_backward_custom([datum(PROMPT)], squared).result().metrics)
    run.optim_step(types.AdamParams(learning_rate=0.0)).result()
    seen["loss"], seen["logprobs"] = loss_of(run), logprobs_of(run)

    state = run.save_state("state").result().path
    weights = run.save_weights_for_sampler("sampler").result().path
    frozen = built(run.save_weights_and_get_sampling_client())
    seen["paths"] = [state, weights]
    seen["snapshot_before"] = sample(frozen)
    seen["named_sample"] = sample(built(service.create_sampling_client(model_path=weights)))
    seen["more_losses"] = train(run, 2)
    seen["snapshot_after"] = sample(frozen)

    resumed = built(service.create_training_client_from_state_with_optimizer(state))
    seen["resumed_loss"], seen["resumed_losses"] = loss_of(resumed), train(resumed, 2)
    fresh = built(service.create_training_client_from_state(state))
    seen["reset_losses"] = train(fresh, 2)
    fresh.load_state(state).result()
    seen["reloaded_loss"] = loss_of(fresh)

    rest = service.create_rest_client()
    seen["listed"] = names(run, rest)
    rest.publish_checkpoint_from_tinker_path(weights).result()
    seen["info"] = rest.get_weights_info_by_tinker_path(state).result().lora_rank
    rest.delete_checkpoint_from_tinker_path(weights).result()
    seen["left"] = names(run, rest)
    seen["runs"] = len(rest.list_training_runs().result().training_runs)
    return seen


if __name__ == "__main__":
    print(json.dumps(main(*sys.argv[1:])))
