from __future__ import annotations

import asyncio
import re
import threading
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
import zstandard

from tests.gateway.scripted import ScriptedBackend
from tests.protocol import sdk_bodies as sdk
from twinkle_serve.config import Config
from twinkle_serve.control.backend import PassCommand
from twinkle_serve.gateway import training
from twinkle_serve.gateway.app import create_app
from twinkle_serve.gateway.context import _CACHE_SIZE, Call, Gateway
from twinkle_serve.gateway.identity import OpenIdentity
from twinkle_serve.gateway.links import Links
from twinkle_serve.protocol.forward import CheckedPass, check_pass


@pytest.fixture
def config(config: Config) -> Config:
    return config.model_copy(update={"http": config.http.model_copy(update={"max_body_bytes": 2**20})})


async def in_parts(size: int) -> AsyncIterator[bytes]:
    for _ in range(0, size, 2**16):
        yield bytes(2**16)


async def test_a_body_above_the_limit_is_refused(client: httpx.AsyncClient) -> None:
    for content in (bytes(2**20 + 1), in_parts(2**21)):
        answer = await client.post("/forward_backward", content=content, headers=sdk.PROTO)
        assert answer.status_code == 413
        assert "1048576" in answer.json()["detail"]


WITH_TOKENS = {"/forward_backward", "/forward", "/asample"}


async def test_what_brings_no_tokens_comes_in_small_bodies_wherever_the_limit_of_all_is(
    backend: ScriptedBackend, config: Config
) -> None:
    """Generated from the API page. These bodies are read in the event loop."""
    large = config.model_copy(update={"http": config.http.model_copy(update={"max_body_bytes": 2**28})})
    transport = httpx.ASGITransport(create_app(lambda: backend, large))
    base, headers = "http://server/api/v1", {"X-API-Key": "tml-test"}
    async with httpx.AsyncClient(transport=transport, base_url=base, headers=headers) as client:
        paths = (await client.get("http://server/openapi.json")).json()["paths"]
        asked = 0
        for path, methods in paths.items():
            route = path.removeprefix("/api/v1").replace("{kind}", "weights")
            route = re.sub("[{}]", "", route)
            for method, described in methods.items():
                if "requestBody" in described and route not in WITH_TOKENS:
                    answer = await client.request(method, route, content=b"{" + b" " * 2**20)
                    assert answer.status_code == 413, (method, route)
                    assert "at most 1048576" in answer.json()["detail"]
                    asked += 1
        assert asked > 20
        for path in sorted(WITH_TOKENS):
            answer = await client.post(path, content=b"{" + b" " * 2**20)
            assert answer.status_code == 400
        answer = await client.post("http://server/v1/completions", content=b"{" + b" " * 2**24)
        assert (answer.status_code, "at most 16777216" in answer.text) == (413, True)


async def test_while_a_large_pass_is_decoded_others_are_answered(
    client: httpx.AsyncClient, backend: ScriptedBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, go_on = threading.Event(), threading.Event()
    inside: list[int] = []

    def slowly(*given: Any) -> CheckedPass:
        inside.append(1)
        begun.set()
        assert go_on.wait(20)
        assert inside.pop() == 1
        assert not inside, "one at a time"
        return check_pass(*given)

    monkeypatch.setattr(training, "check_pass", slowly)
    large = [sdk.cross_entropy([1] * 30)] * 200
    bodies = [sdk.forward_proto(large, seq_id) for seq_id in (1, 2)]
    sent = [
        asyncio.create_task(client.post("/forward_backward", content=body, headers=sdk.PROTO))
        for body in bodies
    ]
    await asyncio.to_thread(begun.wait, 20)
    answer = await client.post("/session_heartbeat", json={"session_id": "s"})
    assert answer.status_code == 200
    assert backend.commands == []
    go_on.set()
    assert [answer.status_code for answer in await asyncio.gather(*sent)] == [200, 200]
    assert sorted(seq_id or 0 for _, seq_id, _ in backend.commands) == [1, 2]
    assert all(isinstance(command, PassCommand) for _, _, command in backend.commands)


async def test_a_compressed_body(client: httpx.AsyncClient, backend: ScriptedBackend) -> None:
    headers = sdk.PROTO | {"Content-Encoding": "zstd"}
    body = zstandard.ZstdCompressor().compress(sdk.forward_proto([sdk.cross_entropy()]))
    assert (await client.post("/forward_backward", content=body, headers=headers)).status_code == 200
    assert isinstance(backend.commands[-1][2], PassCommand)
    bomb = zstandard.ZstdCompressor().compress(bytes(2**26))
    assert (await client.post("/forward_backward", content=bomb, headers=headers)).status_code == 413
    assert (await client.post("/forward_backward", content=b"x", headers=headers)).status_code == 400


async def test_a_body_is_not_needed_to_publish(client: httpx.AsyncClient) -> None:
    path = "/training_runs/r:train:0/checkpoints/weights/a/publish"
    answer = await client.post(path, headers={"Content-Type": "application/json"})
    assert answer.status_code == 204
    assert answer.content == b""


async def test_the_api_page_shows_requests(client: httpx.AsyncClient) -> None:
    page = (await client.get("http://server/openapi.json")).json()
    step = page["paths"]["/api/v1/optim_step"]["post"]["requestBody"]["content"]["application/json"]
    assert "adam_params" in step["schema"]["properties"]
    create = page["paths"]["/api/v1/create_model"]["post"]["requestBody"]["content"]["application/json"]
    assert create["schema"]["properties"]["lora_config"]["properties"]["rank"]["type"] == "integer"
    assert page["paths"]["/api/v1/optim_step"]["post"]["tags"] == ["training"]
    load = page["paths"]["/api/v1/load_weights"]["post"]["requestBody"]["content"]["application/json"]
    forms = [set(form["required"]) for form in load["schema"]["anyOf"]]
    assert forms == [{"model_id", "path"}, {"session_id", "model_seq_id", "path"}]
    sample = page["paths"]["/api/v1/asample"]["post"]["requestBody"]["content"]["application/json"]
    assert {"sampling_session_id", "seq_id", "prompt", "num_samples"} <= set(sample["schema"]["properties"])


async def test_the_cache_of_models_is_bounded(backend: ScriptedBackend, config: Config) -> None:
    gateway = Gateway(lambda: backend, config, OpenIdentity(), Links(b"s"))
    limits = config.limits.tenant
    with gateway.doors.visit("t", limits) as visit:
        call = Call(gateway, backend, "t", "name", limits, visit)
        for index in range(_CACHE_SIZE + 10):
            await call.datum_limits(f"run-{index}", 0)
    assert len(gateway.models) == _CACHE_SIZE
    assert ("t", "run-0") not in gateway.models
