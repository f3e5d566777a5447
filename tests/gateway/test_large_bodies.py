"""Bodies that take long to decode: what is done with them leaves the event loop to everybody else."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import numpy as np
import pytest
import zstandard

from tests.gateway.scripted import ScriptedBackend
from tests.protocol import sdk_bodies as sdk
from twinkle_serve.config import Config
from twinkle_serve.control.backend import OptimCommand, PassCommand, Poll
from twinkle_serve.gateway import context, futures, sampling, training
from twinkle_serve.gateway.app import create_app
from twinkle_serve.gateway.identity import Caller, CheckedIdentity
from twinkle_serve.protocol import results
from twinkle_serve.protocol.data import Column, ForwardResult
from twinkle_serve.protocol.errors import UserError
from twinkle_serve.protocol.results import encode_result
from twinkle_serve.protocol.sample import decode_sample

LARGE = 2**17


@pytest.fixture
def threads(monkeypatch: pytest.MonkeyPatch) -> dict[str, threading.Thread]:
    """Which thread did each part of the work, filled as requests come."""
    found: dict[str, threading.Thread] = {}

    def watch(module: Any, name: str) -> None:
        whole: Callable[..., Any] = getattr(module, name)

        def watched(*arguments: Any, **options: Any) -> Any:
            found[name] = threading.current_thread()
            return whole(*arguments, **options)

        monkeypatch.setattr(module, name, watched)

    for name in ("parse_object", "parse_json", "parse_proto", "check_pass"):
        watch(training, name)
    watch(context, "decompress")
    return found


def beside(threads: dict[str, threading.Thread]) -> set[str]:
    return {name for name, thread in threads.items() if thread is not threading.current_thread()}


async def test_large_json_passes(
    client: httpx.AsyncClient, backend: ScriptedBackend, threads: dict[str, threading.Thread]
) -> None:
    body = sdk.forward_json([sdk.json_datum([1, 2])], 1)
    either = body | {"forward_input": body["forward_backward_input"]}
    for number, route in enumerate(("forward_backward", "forward"), 1):
        for padding, expected in ((0, set()), (LARGE, {"parse_object", "parse_json", "check_pass"})):
            content = json.dumps(either | {"seq_id": 2 * number + bool(padding), "padding": "x" * padding})
            answer = await client.post(f"/{route}", content=content)
            assert answer.status_code == 200, answer.text
            assert beside(threads) == expected
    assert all(isinstance(command, PassCommand) for _, _, command in backend.commands)
    assert len(backend.commands) == 4


async def test_large_protobuf_passes_and_what_was_compressed(
    client: httpx.AsyncClient, backend: ScriptedBackend, threads: dict[str, threading.Thread]
) -> None:
    small = sdk.forward_proto([sdk.datum([1, 2])], 1)
    packed = sdk.PROTO | {"Content-Encoding": "zstd"}
    await client.post("/forward_backward", content=zstandard.compress(small), headers=packed)
    assert beside(threads) == set()
    # Random, so that it stays large; too long for the model, which is found out at the end.
    tokens = np.random.default_rng(0).integers(0, 2**31, LARGE // 4)
    large = sdk.forward_proto([sdk.datum(tokens.tolist())], 2)
    await client.post("/forward_backward", content=zstandard.compress(large), headers=packed)
    assert beside(threads) == {"decompress", "parse_proto", "check_pass"}
    assert len(backend.commands) == 2


async def test_what_becomes_large_is_unpacked_beside(
    client: httpx.AsyncClient, threads: dict[str, threading.Thread]
) -> None:
    """However few bytes were sent."""
    packed = {"Content-Encoding": "zstd"}
    body = {"model_id": sdk.RUN, "seq_id": 1, "adam_params": {}, "padding": "x" * 2 * LARGE}
    content = zstandard.compress(json.dumps(body).encode())
    assert len(content) < 500
    assert (await client.post("/optim_step", content=content, headers=packed)).status_code == 200
    assert beside(threads) == {"decompress"}
    threads.clear()
    unannounced = zstandard.ZstdCompressor(write_content_size=False).compress(b'{"model_id": "m"}')
    assert (await client.post("/optim_step", content=unannounced, headers=packed)).status_code == 200
    assert beside(threads) == {"decompress"}


async def test_other_large_objects(
    client: httpx.AsyncClient, backend: ScriptedBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    parsing: list[threading.Thread] = []

    def parse(body: bytes) -> Any:
        parsing.append(threading.current_thread())
        return json.loads(body)

    monkeypatch.setattr(context, "parse_object", parse)
    for number, padding in ((1, 0), (2, LARGE)):
        body = {"model_id": sdk.RUN, "seq_id": number, "adam_params": {}, "padding": "x" * padding}
        answer = await client.post("/optim_step", json=body)
        assert answer.status_code == 200, answer.text
    here = threading.current_thread()
    assert [thread is here for thread in parsing] == [True, False]
    assert all(isinstance(command, OptimCommand) for _, _, command in backend.commands)


async def test_large_samples(
    client: httpx.AsyncClient, backend: ScriptedBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: list[threading.Thread] = []

    def decode(*arguments: Any) -> Any:
        found.append(threading.current_thread())
        return decode_sample(*arguments)

    monkeypatch.setattr(sampling, "decode_sample", decode)
    prompt = {"chunks": [{"type": "encoded_text", "tokens": [1, 2]}]}
    for number, padding in ((1, 0), (2, LARGE)):
        body = {
            "sampling_session_id": "s:sample:0",
            "seq_id": number,
            "prompt": prompt,
            "padding": "x" * padding,
        }
        assert (await client.post("/asample", json=body)).status_code == 200
    here = threading.current_thread()
    assert [thread is here for thread in found] == [True, False]
    assert [sample.prompt.tolist() for sample in backend.samples] == [[1, 2], [1, 2]]


async def test_large_results(
    client: httpx.AsyncClient, backend: ScriptedBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: list[threading.Thread] = []

    def encode(*arguments: Any) -> Any:
        found.append(threading.current_thread())
        return encode_result(*arguments)

    monkeypatch.setattr(futures, "encode_result", encode)
    monkeypatch.setattr(results, "MAX_JSON_CELLS", LARGE)
    for name, length in (("small", 10), ("large", LARGE), ("too-large", LARGE + 1)):
        logprobs = Column(np.zeros(length, np.float32), np.zeros(1, np.int32))
        backend.polls[name] = Poll("done", ForwardResult(logprobs, np.array([length]), {}))
    small, large, too_large = [
        (await client.post("/retrieve_future", json={"request_id": name})).json() for name in backend.polls
    ]
    assert len(small["loss_fn_outputs"][0]["logprobs"]["data"]) == 10
    assert len(large["loss_fn_outputs"][0]["logprobs"]["data"]) == LARGE
    assert too_large["category"] == "user"
    assert "application/x-protobuf" in too_large["error"]
    here = threading.current_thread()
    assert [thread is here for thread in found] == [True, False, False]


async def test_slow_passes_leave_the_threads_in_which_keys_are_checked(
    backend: ScriptedBackend, config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, go_on = threading.Semaphore(0), threading.Event()

    def check(*_: Any) -> None:
        begun.release()
        go_on.wait()
        raise UserError("wrong")

    monkeypatch.setattr(training, "check_pass", check)
    asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(2))
    identity = CheckedIdentity(lambda key: Caller(key, key), good_s=20)
    app = create_app(lambda: backend, config, identity=identity)
    transport = httpx.ASGITransport(app=app)
    async with httpx.AsyncClient(transport=transport, base_url="http://server/api/v1") as client:

        async def send(key: str) -> httpx.Response:
            body = sdk.forward_json([], 1) | {"model_id": f"run-{key}", "padding": "x" * LARGE}
            return await client.post("/forward_backward", json=body, headers={"X-API-Key": key})

        try:
            slow = []
            for key in ("a", "b"):
                slow.append(asyncio.create_task(send(key)))
                while not begun.acquire(blocking=False):
                    await asyncio.sleep(0.001)
            other = asyncio.create_task(client.get("/get_server_capabilities", headers={"X-API-Key": "c"}))
            await asyncio.wait([other], timeout=20)
            assert other.done()
            assert other.result().status_code == 200
            assert not any(task.done() for task in slow)
        finally:
            go_on.set()
        assert [answer.status_code for answer in await asyncio.gather(*slow)] == [200, 200]
