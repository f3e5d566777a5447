"""What naive servers get wrong, by number, as far as training and promises go; see also
test_traps_service.py. Ordering itself is tested with the control plane: here, that the gateway leaves
everything to it that it needs.
"""

from __future__ import annotations

import asyncio
import json
import math
from dataclasses import replace
from typing import Any

import httpx
import numpy as np
import pytest
from tinker import types
from tinker.lib.chunked_fwdbwd_helpers import combine_fwd_bwd_output_results
from tinker.proto.response_conv import deserialize_forward_backward_output, deserialize_sample_response

from tests.gateway import scripted
from tests.gateway.scripted import ScriptedBackend
from tests.protocol import sdk_bodies as sdk
from twinkle_serve.config import Config
from twinkle_serve.control.backend import (
    OptimCommand,
    PassCommand,
    Poll,
    RejectedCommand,
    SnapshotCommand,
)
from twinkle_serve.gateway import training
from twinkle_serve.gateway.app import create_app
from twinkle_serve.gateway.futures import hold_seconds
from twinkle_serve.protocol.data import Column, DatumBatch, ForwardResult, SampledSequence, SampleResult
from twinkle_serve.protocol.results import PROTOBUF
from twinkle_serve.protocol.work import Failure

RUN = sdk.RUN


def forward_result(lengths: tuple[int, ...] = (3, 2), **metrics: float) -> ForwardResult:
    logprobs = Column(-np.arange(sum(lengths), dtype=np.float32), np.zeros(len(lengths), np.int32))
    return ForwardResult(logprobs, np.array(lengths), {"loss:sum": 6.0, **metrics})


def sample_result(*stop_reasons: str) -> SampleResult:
    tokens, logprobs = np.array([7, 2], np.int32), np.array([-0.5, -1.5], np.float32)
    sequences = tuple(SampledSequence(tokens, logprobs, reason) for reason in stop_reasons)
    return SampleResult(sequences, prompt_logprobs=np.array([np.nan, -1.0, -2.0], np.float32))


async def poll(client: httpx.AsyncClient, request_id: str, accept: str = PROTOBUF) -> httpx.Response:
    return await client.post("/retrieve_future", json={"request_id": request_id}, headers={"Accept": accept})


async def send_pass(client: httpx.AsyncClient, body: bytes) -> httpx.Response:
    return await client.post("/forward_backward", content=body, headers=sdk.PROTO)


def the_pass(backend: ScriptedBackend) -> tuple[PassCommand, DatumBatch]:
    command = backend.commands[-1][2]
    assert isinstance(command, PassCommand), command
    return command, DatumBatch.unpack(command.datums)


async def test_trap_01_protobuf_results_when_accepted(
    client: httpx.AsyncClient, backend: ScriptedBackend
) -> None:
    backend.polls = {
        "train-1": Poll("done", forward_result()),
        "sample-1": Poll("done", sample_result("stop")),
    }
    answer = await poll(client, "train-1")
    assert answer.headers["content-type"] == PROTOBUF
    assert len(deserialize_forward_backward_output(answer.content).loss_fn_outputs) == 2
    answer = await poll(client, "sample-1")
    assert answer.headers["content-type"] == PROTOBUF
    assert deserialize_sample_response(answer.content).sequences[0].tokens == [7, 2]
    for request_id in ("train-1", "sample-1"):
        assert (await poll(client, request_id, "application/json")).json()


async def test_trap_02_metric_names_have_one_colon(
    client: httpx.AsyncClient, backend: ScriptedBackend
) -> None:
    backend.polls["train-1"] = Poll("done", forward_result())
    output = deserialize_forward_backward_output((await poll(client, "train-1")).content)
    assert all(name.count(":") == 1 for name in output.metrics)
    combined = combine_fwd_bwd_output_results([output, output])
    assert combined.metrics["loss:sum"] == 12.0


async def test_trap_03_loss_sum_is_always_there(client: httpx.AsyncClient, backend: ScriptedBackend) -> None:
    backend.polls["train-1"] = Poll("done", forward_result())
    assert (
        deserialize_forward_backward_output((await poll(client, "train-1")).content).metrics["loss:sum"] == 6
    )
    assert (await poll(client, "train-1", "application/json")).json()["metrics"]["loss:sum"] == 6


async def test_trap_04_one_output_per_datum(client: httpx.AsyncClient, backend: ScriptedBackend) -> None:
    backend.polls["train-1"] = Poll("done", forward_result(**{"entropy:mean": 2.0}))
    output = deserialize_forward_backward_output((await poll(client, "train-1")).content)
    assert combine_fwd_bwd_output_results([output]).metrics["entropy:mean"] == 2.0


async def test_trap_05_sample_sequence_ids(client: httpx.AsyncClient) -> None:
    body = {
        "sampling_session_id": "s",
        "seq_id": 0,
        "num_samples": 3,
        "prompt": {"chunks": [{"tokens": [1]}]},
    }
    ids = (await client.post("/asample", json=body)).json()["sample_sequence_ids"]
    assert len(ids) == len(set(ids)) == 3
    assert all(isinstance(item, str) for item in ids)


async def test_trap_06_not_ready_is_held(client: httpx.AsyncClient, backend: ScriptedBackend) -> None:
    backend.polls["train-1"] = None
    waiting = asyncio.create_task(poll(client, "train-1"))
    while not backend.holds:
        await asyncio.sleep(0)
    assert not waiting.done()
    backend.settle("train-1", Poll("done", forward_result()))
    assert (await waiting).status_code == 200


@pytest.mark.parametrize(
    ("patience", "longest", "hold"),
    [
        ("45", 30, 30),
        ("45", 40, 35),
        ("20", 30, 10),
        ("12", 30, 6),
        ("", 30, 30),
        ("x", 30, 30),
        ("-1", 30, 0),
    ],
)
def test_trap_07_hold_ends_before_the_clients_patience(patience: str, longest: float, hold: float) -> None:
    assert hold_seconds({"x-stainless-read-timeout": patience}, longest) == hold
    assert hold_seconds({"x-stainless-read-timeout": "nan"}, longest) == 0


async def test_trap_08_retrieve_future_never_says_5xx(
    client: httpx.AsyncClient, backend: ScriptedBackend, caplog: pytest.LogCaptureFixture
) -> None:
    backend.polls["train-1"] = Poll("done", value=object())
    answer = await poll(client, "train-1")
    assert answer.status_code == 200
    assert answer.json()["category"] == "server"
    assert "train-1" in caplog.text
    backend.error = RuntimeError("a bug in /secret/path")
    answer = await poll(client, "train-1")
    assert answer.status_code == 200
    assert "secret" not in answer.text


async def test_trap_09_no_error_key_on_success(client: httpx.AsyncClient, backend: ScriptedBackend) -> None:
    backend.polls["train-1"] = Poll("done", {"path": "tinker://r/weights/a", "error": None})
    answer = (await poll(client, "train-1")).json()
    assert answer == {"path": "tinker://r/weights/a"}


async def test_trap_10_json_results_are_finite(client: httpx.AsyncClient, backend: ScriptedBackend) -> None:
    backend.polls["step"] = Poll("done", {"grad_norm": math.nan, "lr": 0.1})
    assert (await poll(client, "step")).json() == {"metrics": {"lr": 0.1}}
    spoiled = forward_result((2,), **{"x:mean": math.inf})
    spoiled.logprobs.values[:] = [-math.inf, math.nan]
    backend.polls["old"] = Poll("done", spoiled)
    answer = await poll(client, "old", "application/json")
    assert "NaN" not in answer.text
    assert "Infinity" not in answer.text
    assert set(answer.json()["metrics"]) == {"loss:sum"}
    assert all(isinstance(x, float) for x in answer.json()["loss_fn_outputs"][0]["logprobs"]["data"])


async def test_trap_11_submitting_does_not_wait(client: httpx.AsyncClient, backend: ScriptedBackend) -> None:
    for seq_id in (3, 2, 1):
        answer = await send_pass(client, sdk.forward_proto([sdk.cross_entropy()], seq_id))
        assert answer.json()["request_id"]
    assert all(value is None for value in backend.polls.values())


async def test_trap_12_seq_ids_reach_the_control_plane(
    client: httpx.AsyncClient, backend: ScriptedBackend
) -> None:
    await send_pass(client, sdk.forward_proto([sdk.cross_entropy()], 2))
    await client.post("/optim_step", json={"model_id": RUN, "seq_id": 3, "adam_params": {}})
    await send_pass(client, sdk.forward_proto([sdk.cross_entropy()], 1))
    await send_pass(client, sdk.forward_proto([sdk.cross_entropy()], None))
    assert [seq_id for _, seq_id, _ in backend.commands] == [2, 3, 1, None]


async def test_trap_13_a_poll_may_come_before_its_predecessors(
    client: httpx.AsyncClient, backend: ScriptedBackend
) -> None:
    request_id = (await send_pass(client, sdk.forward_proto([sdk.cross_entropy()], 2))).json()["request_id"]
    answer = await poll(client, request_id)
    assert answer.status_code == 408
    assert answer.json()["queue_state_reason"] == "position 3"


@pytest.mark.parametrize(
    ("route", "content"),
    [
        ("optim_step", {"adam_params": {"learning_rate": -1}}),
        ("optim_step", {"adam_params": {"beta1": "much"}}),
        ("optim_step", {"optimizer_params": {"type": "dimuon"}}),
        ("save_weights", {"path": "a/b"}),
        ("save_weights", {"path": "a", "ttl_seconds": 5}),
        ("save_weights", {"path": "a", "user_metadata": {"k": "x" * 2**16}}),
        ("save_weights_for_sampler", {"path": "publish"}),
        ("save_weights_for_sampler", {"sampling_session_seq_id": 0, "kind": "sideways"}),
        ("save_weights_external", {}),
        ("save_weights_external", {"path": "x", "age_encryption_recipients": ["age1"]}),
        ("load_weights", {"path": "file:///etc", "optimizer": False}),
        ("forward", {}),
        ("forward_backward", {"forward_backward_input": {"data": [], "loss_fn": "cross_entropy"}}),
        ("forward_backward", {"forward_backward_input": 3}),
    ],
)
async def test_trap_14_a_wrong_request_still_spends_its_seq_id(
    client: httpx.AsyncClient, backend: ScriptedBackend, route: str, content: dict[str, Any]
) -> None:
    answer = await client.post(f"/{route}", json={"model_id": RUN, "seq_id": 5, **content})
    assert answer.status_code == 200, answer.text
    assert answer.json()["request_id"]
    run_id, seq_id, command = backend.commands[-1]
    assert (run_id, seq_id) == (RUN, 5)
    assert isinstance(command, RejectedCommand)
    assert command.failure.category == "user"


async def test_a_request_that_we_fail_to_check_spends_its_seq_id_too(
    client: httpx.AsyncClient, backend: ScriptedBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise ZeroDivisionError("a detail of ours")

    monkeypatch.setattr(training, "check_pass", fail)
    answer = await send_pass(client, sdk.forward_proto([sdk.cross_entropy()], 7))
    assert answer.status_code == 200, answer.text
    [(run, seq_id, command)] = backend.commands
    assert (run, seq_id) == (RUN, 7)
    assert isinstance(command, RejectedCommand)
    assert command.failure.category == "server"
    assert "detail" not in command.failure.message


async def test_a_small_body_is_refused_before_it_becomes_a_large_batch(
    client: httpx.AsyncClient, backend: ScriptedBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = replace(scripted.MODEL, vocab_size=10**5, max_context_length=4096)
    monkeypatch.setattr(scripted, "MODEL", model)
    rows = types.TensorData(
        data=[],
        dtype="int64",
        shape=[4096, 1024],
        sparse_crow_indices=[0] * 4097,
        sparse_col_indices=[],
    )
    await send_pass(client, sdk.forward_proto([sdk.datum([1] * 4096, target_tokens=rows)], 1))
    command = backend.commands[-1][2]
    assert isinstance(command, RejectedCommand)
    assert "target_tokens has 4194304 elements when dense" in command.failure.message
    item = {"data": [], "dtype": "int64", "shape": [4096, 1024]}
    item |= {"sparse_crow_indices": [0] * 4097, "sparse_col_indices": []}
    datum = sdk.json_datum([1] * 4096)
    datum["loss_fn_inputs"]["target_tokens"] = item
    body = sdk.forward_json([datum], 2)
    await client.post("/forward_backward", json=body)
    await client.post("/forward", json=body | {"forward_input": body["forward_backward_input"], "seq_id": 3})
    for _, _, command in backend.commands[1:]:
        assert isinstance(command, RejectedCommand)
        assert "target_tokens has 4194304 elements when dense" in command.failure.message
    assert len(backend.commands) == 3


async def test_trap_15_dedupe_ignores_the_idempotency_key(
    client: httpx.AsyncClient, backend: ScriptedBackend
) -> None:
    body = {"model_id": RUN, "seq_id": 1, "adam_params": {"learning_rate": 0.1}}
    ids = [
        (await client.post("/optim_step", json=body, headers={"X-Idempotency-Key": key})).json()["request_id"]
        for key in ("a", "b", "b")
    ]
    assert len(set(ids)) == 1
    assert len(backend.commands) == 1


async def test_trap_16_a_duplicate_may_differ(client: httpx.AsyncClient, backend: ScriptedBackend) -> None:
    ids = []
    for sampling_session_seq_id in (4, 5):
        body = {"model_id": RUN, "seq_id": 1, "sampling_session_seq_id": sampling_session_seq_id}
        ids.append((await client.post("/save_weights_for_sampler", json=body)).json()["request_id"])
    assert ids[0] == ids[1]
    assert [command for *_, command in backend.commands] == [SnapshotCommand(4)]


async def test_trap_21_model_ids_come_from_session_and_number(
    client: httpx.AsyncClient, backend: ScriptedBackend
) -> None:
    body = {"session_id": "S", "model_seq_id": 7, "base_model": "Qwen/Tiny", "lora_config": {"rank": 4}}
    request_id = (await client.post("/create_model", json=body)).json()["request_id"]
    assert (await poll(client, request_id)).json()["model_id"] == "S:train:7"
    body = {"session_id": "S", "model_seq_id": 8, "path": "tinker://S:train:7/weights/a", "optimizer": True}
    request_id = (await client.post("/load_weights", json=body)).json()["request_id"]
    assert (await poll(client, request_id)).json()["model_id"] == "S:train:8"
    info = (await client.post("/get_info", json={"model_id": "S:train:8"})).json()
    assert info["model_id"] == "S:train:8"
    assert info["model_data"]["model_name"] == "Qwen/Tiny"


async def test_trap_23_losses_are_not_normalised(client: httpx.AsyncClient, backend: ScriptedBackend) -> None:
    """What the engine sums is what was sent: no weight is divided by the size of its request."""
    await send_pass(client, sdk.forward_proto([sdk.cross_entropy()] * 4))
    np.testing.assert_array_equal(the_pass(backend)[1].columns["weights"].values, np.ones(12, np.float32))


async def test_trap_24_one_logprob_per_target_position(
    client: httpx.AsyncClient, backend: ScriptedBackend
) -> None:
    ignored = sdk.datum([1, 2, 3], target_tokens=[2, 3, 4], weights=[0.0, 0.0, 1.0])
    await send_pass(client, sdk.forward_proto([ignored]))
    assert the_pass(backend)[1].columns["target_tokens"].values.tolist() == [2, 3, 4]
    backend.polls["train-9"] = Poll("done", forward_result((3,)))
    output = deserialize_forward_backward_output((await poll(client, "train-9")).content)
    assert output.loss_fn_outputs[0]["logprobs"].shape == [3]


async def test_trap_25_negative_weights_are_kept(client: httpx.AsyncClient, backend: ScriptedBackend) -> None:
    given = [-3.5, 0.0, 1e6]
    await send_pass(client, sdk.forward_proto([sdk.datum([1, 2, 3], target_tokens=[1, 2, 3], weights=given)]))
    assert the_pass(backend)[1].columns["weights"].values.tolist() == given


async def test_trap_26_csr_entries_that_are_not_listed_are_0(
    client: httpx.AsyncClient, backend: ScriptedBackend
) -> None:
    torch = pytest.importorskip("torch")
    from tinker import types

    targets, weights = torch.zeros(4, 8, dtype=torch.int64), torch.zeros(4, 8)
    targets[2, 5], weights[0, 0] = 9, 2.0
    sparse = {
        "target_tokens": types.TensorData.from_torch_sparse(targets),
        "weights": types.TensorData.from_torch_sparse(weights),
    }
    assert sparse["weights"].sparse_crow_indices is not None
    await send_pass(client, sdk.forward_proto([sdk.datum([1, 2, 3, 4], **sparse)]))
    _, batch = the_pass(backend)
    assert batch.columns["target_tokens"].widths.tolist() == [8]
    np.testing.assert_array_equal(batch.columns["target_tokens"].values.reshape(4, 8), targets.numpy())
    np.testing.assert_array_equal(batch.columns["weights"].values.reshape(4, 8), weights.numpy())


async def test_trap_34_results_can_be_read_again(client: httpx.AsyncClient, backend: ScriptedBackend) -> None:
    backend.polls["train-1"] = Poll("done", forward_result())
    answers = [await poll(client, "train-1") for _ in range(3)]
    assert len({answer.content for answer in answers}) == 1


async def test_trap_35_lost_samples_are_410_and_lost_steps_404(client: httpx.AsyncClient) -> None:
    for request_id, status in (("sample-lost", 410), ("train-lost", 404), ("", 404)):
        answer = await poll(client, request_id)
        assert answer.status_code == status
        assert answer.json()["detail"]


async def test_trap_36_old_and_future_clients_are_welcome(
    client: httpx.AsyncClient, backend: ScriptedBackend
) -> None:
    body = sdk.forward_json([sdk.json_datum([1, 2])])
    answer = await client.post("/forward_backward", json=body | {"shiny": 1, "type": "something else"})
    assert answer.status_code == 200
    command, batch = the_pass(backend)
    assert command.backward
    assert batch.columns["weights"].values.tolist() == [1.0, 1.0]
    body = {"model_id": RUN, "seq_id": 2, "adam_params": {"learning_rate": 3.0, "beta1": None}}
    await client.post("/optim_step", json=body)
    step = backend.commands[-1][2]
    assert isinstance(step, OptimCommand)
    assert (step.params.learning_rate, step.params.beta1, step.params.eps) == (3.0, 0.9, 1e-12)


async def test_trap_45_not_ready_is_a_408(client: httpx.AsyncClient, backend: ScriptedBackend) -> None:
    backend.polls["train-1"] = None
    answer = await poll(client, "train-1")
    assert answer.status_code == 408
    assert answer.json()["type"] == "try_again"
    assert answer.json()["queue_state"] == "paused_capacity"


async def test_handles_are_resolved_by_the_hook(config: Config, backend: ScriptedBackend) -> None:
    async def resolve(handle: Any) -> Any:
        return forward_result() if handle == "handle" else handle

    backend.polls["train-1"] = Poll("done", "handle")
    app = create_app(lambda: backend, config, resolve=resolve)
    transport = httpx.ASGITransport(app=app)
    async with httpx.AsyncClient(
        transport=transport, base_url="http://server/api/v1", headers={"X-API-Key": "tml-x"}
    ) as client:
        assert deserialize_forward_backward_output((await poll(client, "train-1")).content).metrics


async def test_failures_are_final_200s(client: httpx.AsyncClient, backend: ScriptedBackend) -> None:
    for category, shown in (("user", "user"), ("server", "server"), ("?", "unknown")):
        backend.polls["train-1"] = Poll("done", failure=Failure("no", category))
        answer = await poll(client, "train-1")
        assert answer.status_code == 200
        assert json.loads(answer.content) == {"error": "no", "category": shown}
