"""Clients that are gone from one moment to the next, over real sockets and a real engine: nothing stays.

That nothing stays in the control plane wherever they vanish is shown in virtual time (tests/control).
"""

from __future__ import annotations

import itertools
import json
import os
import signal
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.gateway.inprocess import serving
from twinkle_serve.config import Config
from twinkle_serve.control import service
from twinkle_serve.control.service import ControlPlane
from twinkle_serve.testing.server import free_port

pytestmark = pytest.mark.slow
KEY = "tml-vanishing"
NUM_CLIENTS = 1_000
PATIENCE_S = 120.0
_SDK_CLIENT = """
import sys, tinker
from tinker import types
service = tinker.ServiceClient(base_url=sys.argv[1], api_key=sys.argv[2])
sampler = service.create_sampling_client(base_model="llama")
params = types.SamplingParams(max_tokens=4000, stop=[])
futures = [sampler.sample(types.ModelInput.from_ints([5, n]), 2, params) for n in range(8)]
print("asked", flush=True)
for future in futures:
    future.result()
"""


@pytest.fixture(scope="module")
def planes() -> list[ControlPlane]:
    return []


@pytest.fixture(scope="module")
def url(
    tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory, planes: list[ControlPlane]
) -> Iterator[str]:
    model = {"name": "llama", "path": str(tiny_llama), "num_threads": 1, "device": "cpu"}
    tree = {
        "models": [model | {"sampler": {"kv_cache_tokens": 32_768}}],
        "storage": {"root": str(tmp_path_factory.mktemp("store"))},
        "http": {"port": free_port(), "poll_hold_s": 2},
        "limits": {"sample_abandon_s": 2},
    }
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(service, "_SWEEP_EVERY_S", 0.5)
        with serving(Config.model_validate(tree), planes) as url:
            yield url


def remains(plane: ControlPlane) -> dict[str, Any]:
    """What there is of anybody's samples, by name; all zero when nobody is there."""
    driver = plane._drivers["llama"]
    sampler = driver.group._engine._sampler  # type: ignore[attr-defined]
    return {
        "blocks": sampler.num_blocks - sampler.num_free_blocks,
        "jobs": sampler.num_active,
        "adapters held": sum(sampler._adapters._users.values()),
        "promises": plane._books.promises.num_pending,
        "samples": len(plane._sampling),
        "flights": len(driver._flights),
        "sequences": driver.num_sequences,
        "pins": len(plane._books.checkpoints._pins),
    }


def assert_nothing_remains(plane: ControlPlane) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while any(remains(plane).values()) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(remains(plane).values()), remains(plane)


class Wire:
    """One client, down to its socket."""

    def __init__(self, url: str) -> None:
        host, port = url.removeprefix("http://").split(":")
        self._socket = socket.create_connection((host, int(port)), timeout=60)

    def send(self, path: str, body: dict[str, Any], *, cut: int = 0) -> None:
        """All of a request but its last ``cut`` bytes."""
        payload = json.dumps(body).encode()
        head = (
            f"POST {path} HTTP/1.1\r\nHost: here\r\nX-API-Key: {KEY}\r\nAuthorization: Bearer {KEY}\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(payload)}\r\n\r\n"
        )
        message = head.encode() + payload
        self._socket.sendall(message[: len(message) - cut])

    def read_some(self) -> bytes:
        return self._socket.recv(65_536)

    def read_object(self) -> dict[str, Any]:
        """The JSON object of a short answer."""
        answer = b""
        while not answer.endswith(b"}"):
            answer += self.read_some()
        found: dict[str, Any] = json.loads(answer[answer.index(b"{") :])
        return found

    def vanish(self) -> None:
        """With a reset, as a process that is killed."""
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self._socket.close()


def sample_body(sampler: str, number: int) -> dict[str, Any]:
    return {
        "sampling_session_id": sampler,
        "seq_id": number,
        "num_samples": 1 + number % 2,
        "prompt": {"chunks": [{"type": "encoded_text", "tokens": [5, number % 300, 9]}]},
        "sampling_params": {"max_tokens": 3000, "stop": []},
    }


def come_and_vanish(url: str, sampler: str, number: int) -> None:
    client, body = Wire(url), sample_body(sampler, number)
    match number % 5:
        case 0:
            client.send("/api/v1/asample", body, cut=40)
        case 1:
            client.send("/api/v1/asample", body)
        case 2:
            client.send("/api/v1/asample", body)
            client.read_some()
        case 3:
            client.send("/api/v1/asample", body)
            client.send("/api/v1/retrieve_future", {"request_id": client.read_object()["request_id"]})
        case _:
            chat = {"model": "llama", "prompt": [5, 9], "max_tokens": 3000, "stream": True}
            client.send("/v1/completions", chat)
            if number % 2:
                client.read_some()
    client.vanish()


def test_a_thousand_disconnects_leave_nothing_behind(url: str, planes: list[ControlPlane]) -> None:
    (plane,) = planes
    with httpx.Client(base_url=f"{url}/api/v1", headers={"X-API-Key": KEY}, timeout=60) as http:
        session = http.post("/create_session", json={}).json()["session_id"]
        body = {"session_id": session, "sampling_session_seq_id": 0, "base_model": "llama"}
        sampler = http.post("/create_sampling_session", json=body).json()["sampling_session_id"]
        with ThreadPoolExecutor(8) as pool:
            list(
                pool.map(
                    come_and_vanish, itertools.repeat(url), itertools.repeat(sampler), range(NUM_CLIENTS)
                )
            )
        assert remains(plane)["promises"] > 0, "nobody vanished in the middle of anything"
        assert_nothing_remains(plane)
        asked = http.post(
            "/asample", json=sample_body(sampler, NUM_CLIENTS) | {"sampling_params": {"max_tokens": 3}}
        )
        result = http.post("/retrieve_future", json={"request_id": asked.json()["request_id"]}).json()
        assert len(result["sequences"][0]["tokens"]) <= 3


def test_a_killed_client_s_blocks_are_free_soon(url: str, planes: list[ControlPlane]) -> None:
    (plane,) = planes
    with subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", _SDK_CLIENT, url, KEY],
        stdout=subprocess.PIPE,
        env=os.environ | {"TINKER_TELEMETRY": "0"},
    ) as client:
        assert client.stdout is not None
        assert client.stdout.readline() == b"asked\n"
        deadline = time.monotonic() + PATIENCE_S
        while remains(plane)["blocks"] < 8 and time.monotonic() < deadline:
            time.sleep(0.01)
        client.send_signal(signal.SIGKILL)
    assert remains(plane)["blocks"] >= 8
    assert_nothing_remains(plane)
