"""SIGKILL of everything while an uploaded loss is being differentiated: it is finished exactly once, and the
loss can be used afterwards."""

from __future__ import annotations

import random
from typing import Any

import pytest
import tinker
import torch
import torch.nn.functional as F
from tinker import types

from tests.faults.conftest import Server, Standing

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.usefixtures("no_stray_sockets"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]
PLACE = "in backward"
STEPS, STRUCK = 4, 1


def preferred(
    logprobs: torch.Tensor, rejected: torch.Tensor, weights: torch.Tensor
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    margin = ((logprobs - rejected) * weights).sum()
    return -F.logsigmoid(0.1 * margin), {"custom/margin:mean": margin.detach()}


def datums() -> list[types.Datum]:
    def column(values: list[Any], dtype: Any = "float32") -> types.TensorData:
        return types.TensorData(data=values, dtype=dtype, shape=[len(values)])

    data = []
    for first in (5, 30, 55):
        tokens = list(range(first, first + 12))
        inputs = {
            "target_tokens": column(tokens[1:], "int64"),
            "rejected": column([-0.5 * (n % 7) for n in tokens[1:]]),
            "weights": column([0.0] * 3 + [1.0] * 8),
        }
        data.append(types.Datum(model_input=types.ModelInput.from_ints(tokens[:-1]), loss_fn_inputs=inputs))
    return data


def train(server: Server, *, struck: bool = False) -> dict[str, Any]:
    """What a client sees of a few steps. struck: everything is killed in the pass of step STRUCK."""
    with tinker.ServiceClient(base_url=server.url, api_key="tml-uploaded") as service:
        run = service.create_lora_training_client(base_model="tiny", rank=4, seed=3).result()
        ranks = {"logprobs": 1, "rejected": 1, "weights": 1}
        handle = service.create_custom_loss(preferred, ranks).result()
        assert handle.loss_id is not None, "it runs in the client"
        metrics = []
        for step in range(STEPS):
            if struck and step == STRUCK:
                (server.traps / PLACE).touch()
            backward = run.forward_backward_custom(datums(), handle)
            adam = run.optim_step(types.AdamParams(learning_rate=1e-2))
            if struck and step == STRUCK:
                server.kill_at("everything", PLACE, random.Random(0))
            metrics.append(dict(backward.result().metrics))
            adam.result()
        after = run.forward(datums(), "cross_entropy").result().loss_fn_outputs
    return {"metrics": metrics, "after": [list(each["logprobs"].data) for each in after]}


def test_it_is_finished_exactly_once(standing: Standing) -> None:
    with standing.borrowed("local") as server:
        quiet = train(server)
        losses = [step["loss:sum"] for step in quiet["metrics"]]
        assert len(set(losses)) == STEPS
        assert train(server, struck=True) == quiet
