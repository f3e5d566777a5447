"""What naive servers get wrong, by number, as far as sampling, listings and plain HTTP go."""

from __future__ import annotations

from typing import Any

import httpx
import pytest
from tinker.proto.response_conv import deserialize_sample_response

from tests.gateway.scripted import MODEL, ScriptedBackend
from tests.gateway.test_traps_training import forward_result, poll, sample_result
from tests.protocol import sdk_bodies as sdk
from twinkle_serve.control.backend import Invalid, NotFound, Poll, SnapshotCommand
from twinkle_serve.control.views import timestamp
from twinkle_serve.protocol import errors
from twinkle_serve.protocol.data import SampleRequest

CHECKPOINT = "/training_runs/session-1:train:0/checkpoints/weights/ck1"
PATH = "tinker://session-1:train:0/weights/ck1"


def sample_body(seq_id: int = 0, **fields: Any) -> dict[str, Any]:
    prompt = {"chunks": [{"type": "encoded_text", "tokens": [1, 2, 3]}]}
    return {"sampling_session_id": "s:sample:0", "seq_id": seq_id, "prompt": prompt, **fields}


def last_sample(backend: ScriptedBackend) -> SampleRequest:
    request = backend.samples[-1]
    assert isinstance(request, SampleRequest), request
    return request


async def test_trap_17_no_409(client: httpx.AsyncClient, backend: ScriptedBackend) -> None:
    for _ in range(2):
        assert (await client.post(f"{CHECKPOINT}/publish")).status_code == 204
    for _ in range(2):
        assert (await client.delete(f"{CHECKPOINT}/publish")).status_code == 204
    backend.error = Invalid("ttl_seconds is wrong")
    assert (await client.put(f"{CHECKPOINT}/ttl", json={"ttl_seconds": 4000})).status_code == 400


@pytest.mark.parametrize(("method", "path"), [("GET", "/nothing"), ("POST", "/auth/token")])
async def test_trap_18_what_is_not_served_is_404(client: httpx.AsyncClient, method: str, path: str) -> None:
    answer = await client.request(method, path)
    assert answer.status_code == 404
    assert answer.json()["detail"]


@pytest.mark.parametrize(
    ("path", "content"),
    [
        ("/optim_step", b"{}"),
        ("/optim_step", b"not json"),
        ("/optim_step", b"[1]"),
        ("/optim_step", b'{"model_id": "r", "seq_id": "x"}'),
        ("/forward_backward", b"{"),
        ("/create_session", b"\xff"),
        ("/create_model", b'{"session_id": "s"}'),
        ("/asample", b"{}"),
        ("/load_weights", b'{"path": "tinker://r/weights/a", "optimizer": true}'),
        ("/create_sampling_session", b'{"session_id": "s", "sampling_session_seq_id": 0}'),
    ],
)
async def test_trap_19_a_400_has_a_json_body_and_a_length(
    client: httpx.AsyncClient, path: str, content: bytes
) -> None:
    answer = await client.post(path, content=content)
    assert answer.status_code == 400
    assert answer.json()["detail"]
    assert int(answer.headers["content-length"]) == len(answer.content) > 0


def test_trap_20_no_402_nor_other_status_that_the_sdk_waits_on() -> None:
    kinds = [getattr(errors, name) for name in errors.__all__ if name not in ("WireError", "UserError")]
    assert {kind.status for kind in kinds} == {400, 401, 404, 410, 413, 429, 503}
    # 429 is what the SDK waits on for as long as it takes: only for what it should send again.
    assert [kind for kind in kinds if kind.status == 429] == [errors.Busy]


async def test_trap_22_unpublish_does_not_delete(client: httpx.AsyncClient, backend: ScriptedBackend) -> None:
    assert (await client.delete(f"{CHECKPOINT}/publish")).status_code == 204
    assert backend.asked("delete_checkpoint") == []
    assert backend.asked("publish_checkpoint")[-1][1:] == (PATH, False)
    assert (await client.delete(CHECKPOINT)).status_code == 204
    assert backend.asked("delete_checkpoint")[-1][1:] == (PATH,)


async def test_trap_27_sample_seq_ids_have_64_bits(
    client: httpx.AsyncClient, backend: ScriptedBackend
) -> None:
    answer = await client.post("/asample", json=sample_body(286_206_069_000_000_000))
    assert answer.status_code == 200
    assert backend.asked("sample")[-1][2] == 286_206_069_000_000_000


async def test_a_samples_seq_id_of_any_size_is_told_short(client: httpx.AsyncClient) -> None:
    answer = await client.post("/asample", json=sample_body() | {"seq_id": [0] * 10**5})
    assert answer.status_code == 400
    assert answer.json()["detail"].endswith("got a list")


@pytest.mark.parametrize(
    ("params", "ids", "strings"),
    [
        ({}, MODEL.eos_token_ids, ()),
        ({"stop": None}, MODEL.eos_token_ids, ()),
        ({"stop": []}, (), ()),
        ({"stop": "END"}, (), ("END",)),
        ({"stop": ["a", "b"]}, (), ("a", "b")),
        ({"stop": [5, 6]}, (5, 6), ()),
    ],
)
async def test_trap_28_an_empty_stop_list_stops_nothing(
    client: httpx.AsyncClient,
    backend: ScriptedBackend,
    params: dict[str, Any],
    ids: tuple[int, ...],
    strings: tuple[str, ...],
) -> None:
    await client.post("/asample", json=sample_body(sampling_params=params))
    asked = last_sample(backend).params
    assert (asked.stop_token_ids, asked.stop_strings) == (ids, strings)


async def test_trap_29_the_stop_token_is_kept(client: httpx.AsyncClient, backend: ScriptedBackend) -> None:
    backend.polls["sample-1"] = Poll("done", sample_result("stop"))
    sequence = deserialize_sample_response((await poll(client, "sample-1")).content).sequences[0]
    assert sequence.tokens == [7, 2]
    assert sequence.logprobs == [-0.5, -1.5]


async def test_trap_30_two_stop_reasons(client: httpx.AsyncClient, backend: ScriptedBackend) -> None:
    backend.polls["sample-1"] = Poll("done", sample_result("stop", "length", "cancelled"))
    found = deserialize_sample_response((await poll(client, "sample-1")).content).sequences
    assert [sequence.stop_reason for sequence in found] == ["stop", "length", "stop"]
    body = (await poll(client, "sample-1", "application/json")).json()
    assert [sequence["stop_reason"] for sequence in body["sequences"]] == ["stop", "length", "stop"]


async def test_trap_31_prompt_logprobs_start_with_nan(
    client: httpx.AsyncClient, backend: ScriptedBackend
) -> None:
    backend.polls["sample-1"] = Poll("done", sample_result("stop"))
    found = deserialize_sample_response((await poll(client, "sample-1")).content).prompt_logprobs
    assert found == [None, -1.0, -2.0]
    assert (await poll(client, "sample-1", "application/json")).json()["prompt_logprobs"] == [
        None,
        -1.0,
        -2.0,
    ]


async def test_trap_32_an_ephemeral_save_has_no_path(
    client: httpx.AsyncClient, backend: ScriptedBackend
) -> None:
    backend.polls["train-1"] = Poll("done", {"sampling_session_id": "s:sample:1", "path": None})
    assert (await poll(client, "train-1")).json() == {"sampling_session_id": "s:sample:1"}


@pytest.mark.parametrize("kind", ["snapshot", "inflight"])
async def test_trap_33_an_ephemeral_sampler_is_a_snapshot(
    client: httpx.AsyncClient, backend: ScriptedBackend, kind: str
) -> None:
    body = {"model_id": sdk.RUN, "seq_id": 3, "sampling_session_seq_id": 1, "kind": kind}
    await client.post("/save_weights_for_sampler", json=body)
    assert backend.commands[-1][2] == SnapshotCommand(1, inflight=kind == "inflight")


async def test_trap_37_telemetry_is_accepted_and_dropped(
    client: httpx.AsyncClient, backend: ScriptedBackend
) -> None:
    for content in (b'{"events": [], "novel": 1}', b"anything"):
        answer = await client.post("/telemetry", content=content)
        assert answer.json() == {"status": "accepted"}
    assert backend.calls == []


async def test_trap_38_client_config_exists(client: httpx.AsyncClient) -> None:
    from tinker.types import ClientConfigResponse

    answer = await client.post("/client/config", json={"sdk_version": "0.38.0"})
    config = ClientConfigResponse.model_validate(answer.json())
    assert config.pjwt_auth_enabled is False
    assert config.parallel_fwdbwd_chunks is False
    answer = await client.post("/client/dynamic_config", json={"sdk_version": "0.38.0"})
    assert answer.json()["sample_cancel_enabled"] is True


async def test_trap_39_sessions_do_no_work(client: httpx.AsyncClient, backend: ScriptedBackend) -> None:
    await client.post("/create_session", json={"tags": ["a"], "user_metadata": {}, "sdk_version": "0.38.0"})
    body = {"session_id": "session-1", "sampling_session_seq_id": 0, "base_model": "Qwen/Tiny"}
    answer = await client.post("/create_sampling_session", json=body)
    assert answer.json() == {"sampling_session_id": "session-1:sample:0"}
    assert [name for name, _ in backend.calls] == ["create_session", "create_sampler"]


async def test_trap_40_a_local_tokenizer_is_named_apart_from_the_model(client: httpx.AsyncClient) -> None:
    info = (await client.post("/get_info", json={"model_id": sdk.RUN})).json()
    assert info["model_data"] == {
        "arch": MODEL.arch,
        "model_name": "Qwen/Tiny",
        "tokenizer_id": "/models/tiny",
    }


def test_trap_41_times_have_a_zone() -> None:
    assert timestamp(0.0) == "1970-01-01T00:00:00Z"


async def test_trap_42_metadata_values_become_strings(
    client: httpx.AsyncClient, backend: ScriptedBackend
) -> None:
    metadata = {"name": "x", "n": 1, "nested": {"a": [True, None]}, "gone": None}
    expected = {"name": "x", "n": "1", "nested": '{"a": [true, null]}', "gone": "null"}
    body = {
        "session_id": "s",
        "model_seq_id": 0,
        "base_model": "Qwen/Tiny",
        "lora_config": {"rank": 1},
        "user_metadata": metadata,
    }
    assert (await client.post("/create_model", json=body)).status_code == 200
    assert backend.asked("create_model")[-1][-1] == expected
    await client.post("/create_session", json={"user_metadata": metadata})
    assert backend.asked("create_session")[-1][1]["user_metadata"] == expected


async def test_other_errors_have_their_statuses(client: httpx.AsyncClient, backend: ScriptedBackend) -> None:
    for error, status in (
        (NotFound("no such run"), 404),
        (Invalid("wrong"), 400),
        (errors.UserError("wrong"), 400),
        (errors.BackendUnavailable("starting"), 503),
        (RuntimeError("a bug in /secret/path"), 500),
    ):
        backend.error = error
        answer = await client.get("/training_runs")
        assert answer.status_code == status
        assert "secret" not in answer.text
        assert answer.json()["detail"]


async def test_polls_wait_while_the_backend_is_away(
    client: httpx.AsyncClient, backend: ScriptedBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("twinkle_serve.gateway.futures.UNAVAILABLE_WAIT_S", 0.001)
    backend.polls["train-1"] = Poll("done", forward_result())
    backend.error = errors.BackendUnavailable("starting again")
    answer = await poll(client, "train-1")
    assert answer.status_code == 408
    assert answer.json()["queue_state_reason"] == "starting again"
    backend.error = None
    assert (await poll(client, "train-1")).status_code == 200
