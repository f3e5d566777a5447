"""The plain routes: answers as the SDK's own models read them."""

from __future__ import annotations

from typing import Any

import httpx
import pytest
from tinker import types
from tinker.types import (
    CheckpointsListResponse,
    GetInfoResponse,
    GetSamplerResponse,
    GetServerCapabilitiesResponse,
    GetSessionResponse,
    ListSessionsResponse,
    TrainingRun,
    TrainingRunsResponse,
    WeightsInfoResponse,
)

from tests.gateway.scripted import MODEL, ScriptedBackend
from twinkle_serve.control.backend import (
    LoadCommand,
    OptimCommand,
    SaveCommand,
    SnapshotCommand,
    UnloadCommand,
)
from twinkle_serve.gateway.runs import client_version
from twinkle_serve.protocol.data import AdamParams, LoraSpec
from twinkle_serve.protocol.errors import BackendUnavailable

RUN = "session-1:train:0"
PATH = f"tinker://{RUN}/weights/a"


async def test_health_needs_no_key_and_is_true_only_if_the_engine_steps(
    client: httpx.AsyncClient, backend: ScriptedBackend
) -> None:
    answer = await client.get("/healthz", headers={"X-API-Key": ""})
    assert (answer.status_code, answer.json()) == (200, {"status": "ok"})
    backend.is_healthy = False
    assert (await client.get("/healthz")).status_code == 503
    backend.is_healthy, backend.error = True, BackendUnavailable("starting")
    assert (await client.get("/healthz")).status_code == 503


async def test_capabilities(client: httpx.AsyncClient) -> None:
    found = GetServerCapabilitiesResponse.model_validate(
        (await client.get("/get_server_capabilities")).json()
    )
    (model,) = found.supported_models
    assert (model.model_name, model.max_context_length) == (MODEL.name, MODEL.max_context_length)
    assert model.trainable
    assert model.sampleable


async def test_the_owner_of_a_key(client: httpx.AsyncClient) -> None:
    owner = (await client.get("/auth/apikey/me")).json()
    assert set(owner) == {"key_id", "name", "note", "details"}
    assert isinstance(owner["key_id"], int)
    assert owner["details"]["org_details"]["name"]


async def test_a_sessions_life(client: httpx.AsyncClient, backend: ScriptedBackend) -> None:
    body = {"tags": ["a"], "user_metadata": {"n": 1}, "sdk_version": "0.38.0", "display_name": "mine"}
    session_id = (await client.post("/create_session", json=body)).json()["session_id"]
    info = backend.asked("create_session")[-1][1]
    assert (info["tags"], info["user_metadata"], info["display_name"]) == (["a"], {"n": "1"}, "mine")
    answer = await client.post("/session_heartbeat", json={"session_id": session_id})
    assert answer.json() == {"type": "session_heartbeat"}
    found = GetSessionResponse.model_validate((await client.get(f"/sessions/{session_id}")).json())
    assert found.training_run_ids == [RUN]
    listed = ListSessionsResponse.model_validate((await client.get("/sessions")).json())
    assert listed.sessions == [session_id]
    reason = {"reason": {"type": "errored"}, "detail": "KeyError"}
    assert (await client.post(f"/sessions/{session_id}/finish", json=reason)).status_code == 204
    assert backend.asked("finish_session")[-1][2] == {"type": "errored", "detail": "KeyError"}
    assert (await client.post("/session_heartbeat", json={"session_id": session_id})).status_code == 410


async def test_a_run_is_described(client: httpx.AsyncClient, backend: ScriptedBackend) -> None:
    answer = await client.post("/get_info", json={"model_id": RUN})
    info = GetInfoResponse.model_validate(answer.json())
    assert (info.model_id, info.lora_rank, info.is_lora) == (RUN, 8, True)
    TrainingRun.model_validate((await client.get(f"/training_runs/{RUN}")).json())
    answer = await client.get("/training_runs", params={"limit": 3, "offset": 1, "access_scope": "owned"})
    runs = TrainingRunsResponse.model_validate(answer.json())
    assert (runs.cursor.limit, runs.cursor.offset, runs.cursor.total_count) == (3, 1, 1)
    assert backend.asked("list_runs")[-1][1:] == (3, 1)
    answer = await client.post("/weights_info", json={"tinker_path": f"twinkle://{RUN}/weights/a"})
    assert WeightsInfoResponse.model_validate(answer.json()).lora_rank == 8
    assert backend.asked("weights_info")[-1][1] == PATH


@pytest.mark.parametrize("query", [{"limit": -1}, {"offset": -1}, {"limit": "x"}, {"offset": 2**40}])
async def test_pages_have_limits(client: httpx.AsyncClient, query: dict[str, Any]) -> None:
    for path in ("/training_runs", "/checkpoints", "/sessions"):
        answer = await client.get(path, params=query)
        assert answer.status_code == 422
        assert answer.json()["detail"]


@pytest.mark.parametrize(
    ("agent", "version", "shown"),
    [
        ("AsyncTinker/Python 0.38.0", (0, 38), 2),
        ("AsyncTinker/Python 0.25.0", (0, 25), 1),
        ("Tinker/Python 0.7.0", (0, 7), 1),
        ("curl/8", None, 2),
    ],
)
async def test_exports_are_kept_from_clients_that_refuse_them(
    client: httpx.AsyncClient, backend: ScriptedBackend, agent: str, version: Any, shown: int
) -> None:
    assert client_version({"user-agent": agent}) == version
    common = {"time": "2026-01-02T03:04:05Z", "tinker_path": PATH}
    backend.checkpoints = [
        {"checkpoint_id": "weights/a", "checkpoint_type": "training", **common},
        {"checkpoint_id": "external_weights/a", "checkpoint_type": "external", **common},
    ]
    for path in ("/checkpoints", f"/training_runs/{RUN}/checkpoints"):
        answer = await client.get(path, headers={"User-Agent": agent})
        assert len(CheckpointsListResponse.model_validate(answer.json()).checkpoints) == shown


async def test_a_sampler_is_described(client: httpx.AsyncClient, backend: ScriptedBackend) -> None:
    body = {"session_id": "s", "sampling_session_seq_id": 4, "model_path": f"twinkle://{RUN}/weights/a"}
    answer = await client.post("/create_sampling_session", json=body)
    assert answer.json() == {"sampling_session_id": "s:sample:4"}
    assert backend.asked("create_sampler")[-1][1:] == ("s", 4, None, PATH)
    sampler = GetSamplerResponse.model_validate((await client.get("/samplers/s:sample:4")).json())
    assert (sampler.sampler_id, sampler.base_model) == ("s:sample:4", MODEL.name)
    assert (await client.get("/samplers/unknown")).status_code == 404


async def test_cancelling_is_always_fine(client: httpx.AsyncClient, backend: ScriptedBackend) -> None:
    for request_id in ("sample-1", "sample-1", "nobody-knows"):
        assert (await client.post("/cancel_future", json={"request_id": request_id})).status_code == 204
    assert len(backend.asked("cancel")) == 3


async def test_a_new_run(client: httpx.AsyncClient, backend: ScriptedBackend) -> None:
    body = {
        "session_id": "s",
        "model_seq_id": 0,
        "base_model": MODEL.name,
        "lora_config": types.LoraConfig(rank=16, seed=9, train_mlp=False).model_dump(),
        "optimizer_config": {"type": "adamw"},
    }
    assert (await client.post("/create_model", json=body)).json()["request_id"]
    assert backend.asked("create_model")[-1][4] == LoraSpec(16, 9, True, False, True)
    for wrong, message in (
        ({"lora_config": {"rank": 33}}, "1 to 32"),
        ({"lora_config": None}, "lora_config"),
        ({"optimizer_config": {"type": "dimuon"}}, "dimuon"),
        ({"base_model": "gpt-5"}, MODEL.name),
    ):
        answer = await client.post("/create_model", json=body | wrong)
        assert answer.status_code in (400, 404)
        assert message in answer.json()["detail"]


async def test_commands_reach_the_control_plane_as_they_were_meant(
    client: httpx.AsyncClient, backend: ScriptedBackend
) -> None:
    metadata = {"user_metadata": {"step": 3}}
    sent = [
        ("optim_step", {"adam_params": {"learning_rate": 0.5}}, OptimCommand(AdamParams(0.5))),
        ("save_weights", {"path": "a"}, SaveCommand("weights", "a")),
        ("save_weights", {"path": None}, SaveCommand("weights", None)),
        (
            "save_weights",
            {"path": "a", "ttl_seconds": 3600, "overwrite": True, **metadata},
            SaveCommand("weights", "a", 3600, True, {"step": "3"}),
        ),
        ("save_weights_for_sampler", {"path": "b"}, SaveCommand("sampler_weights", "b")),
        (
            "save_weights_for_sampler",
            {"path": "b", "sampling_session_seq_id": 2},
            SaveCommand("sampler_weights", "b"),
        ),
        ("save_weights_for_sampler", {"sampling_session_seq_id": 2}, SnapshotCommand(2)),
        (
            "save_weights_for_sampler",
            {"sampling_session_seq_id": 2, "kind": "inflight"},
            SnapshotCommand(2, inflight=True),
        ),
        ("save_weights_external", {"path": "c"}, SaveCommand("external_weights", "c")),
        ("load_weights", {"path": PATH, "optimizer": True}, LoadCommand(PATH, True)),
        ("load_weights", {"path": PATH}, LoadCommand(PATH, False)),
        ("unload_model", {}, UnloadCommand()),
    ]
    for seq_id, (route, content, command) in enumerate(sent, start=1):
        answer = await client.post(f"/{route}", json={"model_id": RUN, "seq_id": seq_id, **content})
        assert answer.json()["model_id"] == RUN
        assert backend.commands[-1] == (RUN, seq_id, command)


async def test_a_run_from_a_checkpoint(client: httpx.AsyncClient, backend: ScriptedBackend) -> None:
    body = {"session_id": "s", "model_seq_id": 3, "path": PATH, "optimizer": True}
    assert (await client.post("/load_weights", json=body)).json()["request_id"]
    assert backend.asked("create_model_from")[-1][1:] == ("s", 3, PATH, True, None)
    assert backend.commands == []
    answer = await client.post("/load_weights", json=body | {"optimizer_config": {"type": "dimuon"}})
    assert answer.status_code == 400


async def test_a_checkpoint_is_changed(client: httpx.AsyncClient, backend: ScriptedBackend) -> None:
    base = f"/training_runs/{RUN}/checkpoints/weights/a"
    for ttl in (3600, None):
        assert (await client.put(f"{base}/ttl", json={"ttl_seconds": ttl})).status_code == 204
        assert backend.asked("set_checkpoint_ttl")[-1][1:] == (PATH, ttl)
    assert (await client.put(f"{base}/ttl", json={"ttl_seconds": 5})).status_code == 400
    assert (await client.post(f"{base}/publish")).status_code == 204
    assert backend.asked("publish_checkpoint")[-1][1:] == (PATH, True)
    wrong = f"/training_runs/{RUN}/checkpoints/other/a"
    assert (await client.delete(wrong)).status_code == 400


async def test_an_older_client_that_pages_by_what_it_was_shown_gets_each_once(
    client: httpx.AsyncClient, backend: ScriptedBackend
) -> None:
    kinds = ["external", "training", "training", "external", "training"]
    backend.checkpoints = [
        {"checkpoint_id": f"{kind}/{at}", "checkpoint_type": kind} for at, kind in enumerate(kinds)
    ]
    seen: list[str] = []
    while True:
        url = f"/checkpoints?limit=2&offset={len(seen)}"
        page = (await client.get(url, headers={"User-Agent": "Tinker/Python 0.18.0"})).json()
        seen += [item["checkpoint_id"] for item in page["checkpoints"]]
        assert page["cursor"]["total_count"] == 3
        if len(seen) >= 3 or not page["checkpoints"]:
            break
    assert seen == ["training/1", "training/2", "training/4"]
