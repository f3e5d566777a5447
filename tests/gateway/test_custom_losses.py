"""create_custom_loss and requests that use what it made, over a scripted backend."""

from __future__ import annotations

from typing import Any

import httpx
import numpy as np
import pytest
import torch

from tests.engine.traced import distilled, k3_penalty, picked, reinforce, wire
from tests.gateway.scripted import ScriptedBackend
from twinkle_serve.control.backend import PassCommand, RejectedCommand
from twinkle_serve.gateway.app import create_app
from twinkle_serve.protocol import graph_batch
from twinkle_serve.protocol.data import DatumBatch
from twinkle_serve.protocol.work import Failure

RUN = "session-1:train:0"
LOSS = "session-1:loss:0"


def upload(fields: dict[str, Any], **changes: Any) -> dict[str, Any]:
    return {"session_id": "session-1", "custom_loss_seq_id": 0, **fields, **changes}


def tensor(data: list[Any], dtype: str = "float32", *shape: int) -> dict[str, Any]:
    return {"data": data, "dtype": dtype} | ({"shape": list(shape)} if shape else {})


def training(*data: dict[str, Any], seq_id: int = 1, **config: Any) -> dict[str, Any]:
    datums = [
        {"model_input": {"chunks": [{"type": "encoded_text", "tokens": [1, 2]}]}, "loss_fn_inputs": inputs}
        for inputs in data
    ]
    inner = {"data": datums, "loss_fn": "custom", "loss_fn_config": config or {"loss_id": LOSS}}
    return {"forward_backward_input": inner, "model_id": RUN, "seq_id": seq_id}


TARGETS = tensor([3, 4], "int64")


async def create(client: httpx.AsyncClient, loss: Any, **ranks: Any) -> None:
    answer = await client.post("/create_custom_loss", json=upload(wire(loss, **ranks)))
    assert answer.json() == {"request_id": "train-0"}


async def last_command(client: httpx.AsyncClient, backend: ScriptedBackend, body: dict[str, Any]) -> Any:
    answer = await client.post("/forward_backward", json=body)
    assert answer.status_code == 200, answer.text
    return backend.commands[-1][2]


async def test_a_request_carries_the_whole_loss(client: httpx.AsyncClient, backend: ScriptedBackend) -> None:
    """So it can be done again from the journal alone."""
    await create(client, k3_penalty, logprobs=1, reference=1, beta=0)
    inputs = {"target_tokens": TARGETS, "reference": tensor([-1.0, -2.0]), "beta": tensor([0.5])}
    command = await last_command(client, backend, training(inputs, inputs))
    assert isinstance(command, PassCommand)
    assert (command.loss_fn, command.backward) == ("custom", True)
    assert command.loss_config == {"graph": backend.losses[LOSS]}
    batch = DatumBatch.unpack(command.datums)
    assert {name: column.values.tolist() for name, column in batch.columns.items()} == {
        "target_tokens": [3, 4, 3, 4],
        "reference": [-1, -2, -1, -2],
        "beta": [0.5] * 4,
    }
    await last_command(client, backend, training(inputs, seq_id=2))
    assert len(backend.asked("custom_loss")) == 1  # it never changes


async def test_a_request_costs_what_its_nodes_do_if_that_is_more_than_its_tokens(
    client: httpx.AsyncClient, backend: ScriptedBackend
) -> None:
    def long(logprobs: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        for _ in range(62):
            logprobs = torch.tanh(logprobs)
        return logprobs.sum(), {}

    await create(client, long, logprobs=1)
    command = await last_command(client, backend, training(*[{"target_tokens": TARGETS}] * 7))
    assert (sum(command.lengths), command.loss_tokens) == (14, 64 * 7 // 32)


async def test_columns_keep_their_kind_and_width(client: httpx.AsyncClient, backend: ScriptedBackend) -> None:
    await create(client, picked, logprobs=1, index=1)
    whole = {"target_tokens": TARGETS, "index": tensor([1, 0], "int64")}
    command = await last_command(client, backend, training(whole))
    assert DatumBatch.unpack(command.datums).columns["index"].values.dtype == np.int64


async def test_targets_may_be_many(client: httpx.AsyncClient, backend: ScriptedBackend) -> None:
    await create(client, distilled, logprobs=2, teacher=2)
    wide = {
        "target_tokens": tensor([3, 4, 5, 6], "int64", 2, 2),
        "teacher": tensor([0.0, -1.0, -2.0, -3.0], "float32", 2, 2),
    }
    command = await last_command(client, backend, training(wide))
    batch = DatumBatch.unpack(command.datums)
    assert batch.columns["teacher"].widths.tolist() == batch.columns["target_tokens"].widths.tolist() == [2]


@pytest.mark.parametrize(
    ("inputs", "words"),
    [
        ({"target_tokens": TARGETS, "reference": TARGETS}, "data[0].loss_fn_inputs.beta is missing"),
        ({"target_tokens": TARGETS, "beta": tensor([1])}, "data[0].loss_fn_inputs.reference is missing"),
        (
            {
                "target_tokens": TARGETS,
                "reference": tensor([1, 2, 3, 4], "float32", 2, 2),
                "beta": tensor([1]),
            },
            "reference has shape [2, 2], but the loss takes [N]",
        ),
        (
            {"target_tokens": tensor([3, 4], "int64", 2, 1), "reference": TARGETS, "beta": tensor([1])},
            "target_tokens has shape [2, 1], but the loss takes [N]",
        ),
        ({"target_tokens": tensor([3], "int64"), "reference": TARGETS, "beta": tensor([1])}, "has length 1"),
        ({"target_tokens": TARGETS, "reference": TARGETS, "beta": tensor([1, 2])}, "takes a scalar"),
        ({"target_tokens": TARGETS, "reference": TARGETS, "beta": tensor([1], "float32", 1, 1)}, "a scalar"),
        ({"target_tokens": tensor([3, 400], "int64")}, "outside the vocabulary"),
        ({"target_tokens": tensor([3.0, 4.0])}, "must be int64"),
        ({"target_tokens": TARGETS, "reference": tensor([1, 1e39])}, "not a finite float32"),
    ],
    ids=lambda each: each if isinstance(each, str) else "",
)
async def test_data_that_does_not_fit_is_refused_by_name(
    client: httpx.AsyncClient, backend: ScriptedBackend, inputs: dict[str, Any], words: str
) -> None:
    await create(client, k3_penalty, logprobs=1, reference=1, beta=0)
    command = await last_command(client, backend, training(inputs))
    assert isinstance(command, RejectedCommand)
    assert words in command.failure.message
    assert command.failure.category == "user"


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({"loss_id": "session-1:loss:9"}, "does not exist"),
        ({"loss_id": 7}, "needs loss_fn_config"),
        ({"other": 1.0}, "needs loss_fn_config"),
        ({"loss_id": LOSS, "beta": 1.0}, "needs loss_fn_config"),
    ],
    ids=str,
)
async def test_a_wrong_id_spends_the_seq_id(
    client: httpx.AsyncClient, backend: ScriptedBackend, asked: dict[str, Any], words: str
) -> None:
    command = await last_command(client, backend, training({"target_tokens": TARGETS}, **asked))
    assert isinstance(command, RejectedCommand)
    assert words in command.failure.message


async def test_another_tenants_loss_does_not_exist(
    client: httpx.AsyncClient, backend: ScriptedBackend
) -> None:
    await create(client, reinforce, logprobs=1, advantages=1)
    inputs = {"target_tokens": TARGETS, "advantages": TARGETS}
    assert isinstance(await last_command(client, backend, training(inputs)), PassCommand)
    backend.tenants.clear()  # the run now belongs to whoever asks; the loss does not
    backend.tenants["session-1"] = "somebody else"
    answer = await client.post(
        "/forward_backward", json=training(inputs, seq_id=2), headers={"X-API-Key": "tml-eve"}
    )
    assert answer.status_code == 200
    command = backend.commands[-1][2]
    assert isinstance(command, RejectedCommand)
    assert "does not exist" in command.failure.message


async def test_a_hostile_graph_is_a_failed_promise(
    client: httpx.AsyncClient, backend: ScriptedBackend
) -> None:
    fields = wire(reinforce, logprobs=1, advantages=1)
    fields["graph"]["nodes"][2]["target"] = "os.system"
    answer = await client.post("/create_custom_loss", json=upload(fields))
    poll = await client.post("/retrieve_future", json=answer.json())
    assert poll.status_code == 200
    assert poll.json()["category"] == "user"
    assert "'os.system' is not served" in poll.json()["error"]
    assert backend.losses == {}


@pytest.mark.parametrize(("num_bytes", "status"), [(900_000, 200), (2_000_000, 413)])
async def test_a_huge_graph_is_not_read(
    client: httpx.AsyncClient, backend: ScriptedBackend, num_bytes: int, status: int
) -> None:
    """What is a little too large is told how large it may be."""
    body = upload(wire(reinforce, logprobs=1, advantages=1), name="n" * num_bytes)
    answer = await client.post("/create_custom_loss", json=body)
    assert answer.status_code == status
    if status == 200:
        answer = await client.post("/retrieve_future", json=answer.json())
    assert "at most" in answer.text
    assert backend.losses == {}


@pytest.mark.parametrize("missing", ["session_id", "custom_loss_seq_id"])
async def test_without_an_address_it_is_a_400(client: httpx.AsyncClient, missing: str) -> None:
    body = upload(wire(reinforce, logprobs=1, advantages=1))
    del body[missing]
    answer = await client.post("/create_custom_loss", json=body)
    assert answer.status_code == 400
    assert missing in answer.json()["detail"]


async def test_many_datums_of_many_nodes_are_refused(
    client: httpx.AsyncClient, backend: ScriptedBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(graph_batch, "MAX_NODE_RUNS", 20)
    await create(client, reinforce, logprobs=1, advantages=1)
    inputs = {"target_tokens": TARGETS, "advantages": TARGETS}
    command = await last_command(client, backend, training(*[inputs] * 5))
    assert isinstance(command, RejectedCommand)
    assert "send fewer datums" in command.failure.message


async def test_an_operator_can_switch_it_off(backend: ScriptedBackend, config: Any) -> None:
    losses = config.losses.model_copy(update={"custom_loss_server_side": False})
    app = create_app(lambda: backend, config.model_copy(update={"losses": losses}))
    async with httpx.AsyncClient(
        transport=httpx.ASGITransport(app=app), base_url="http://s/api/v1", headers={"X-API-Key": "tml-a"}
    ) as client:
        told = (await client.post("/client/config", json={})).json()
        assert told["custom_loss_server_side"] is False
        await client.post("/create_custom_loss", json=upload(wire(reinforce, logprobs=1, advantages=1)))
        ((*_, graph),) = backend.asked("create_custom_loss")
        assert isinstance(graph, Failure)


async def test_clients_are_told_to_upload(client: httpx.AsyncClient) -> None:
    assert (await client.post("/client/config", json={})).json()["custom_loss_server_side"] is True
