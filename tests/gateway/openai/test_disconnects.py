"""Clients whose connections break in mid-sample, on real sockets and a real engine: nothing stays behind."""

from __future__ import annotations

import asyncio
import json
import random
from pathlib import Path
from typing import Any

import pytest
import uvicorn

from tests.gateway.inprocess import control_plane
from twinkle_serve.config import Config
from twinkle_serve.control.service import ControlPlane
from twinkle_serve.gateway.app import create_app
from twinkle_serve.gateway.openai import following
from twinkle_serve.testing.server import free_port

pytestmark = pytest.mark.slow
NUM_CLIENTS = 100


async def vanish(port: int, number: int) -> None:
    """Ask for a long answer, read a little of it or nothing, and break the connection without goodbye."""
    rng = random.Random(number)
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    body = json.dumps(
        {
            "model": "llama",
            "prompt": [5 + number % 50, 7],
            "max_tokens": 3_000,
            "n": rng.choice([1, 2]),
            "stream": number % 2 == 0,
            "top_k": 2,
        }
    ).encode()
    head = (
        f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer tml-{number % 3}\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    writer.write(head.encode() + body)
    await writer.drain()
    if number % 4 == 0:
        await reader.readline()
    else:
        await asyncio.sleep(rng.random())
    writer.transport.abort()


async def nothing_left(plane: ControlPlane) -> None:
    """Returns once all is free; the test's time limit is the only other end."""
    driver: Any = plane._drivers["llama"]
    sampler = driver.group._engine._sampler
    while (
        sampler.num_active or sampler.num_free_blocks != sampler._cache.capacity // 16 or len(plane._sampling)
    ):
        await asyncio.sleep(0.1)
    assert plane._books.promises.num_pending == 0
    assert (len(driver._flights), driver.num_sequences) == (0, 0)


async def test_broken_connections_free_what_they_held(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(following, "_LOOK_EVERY_S", 0.2)
    port = free_port()
    tree = {
        "models": [{"name": "llama", "path": str(tiny_llama), "num_threads": 1, "device": "cpu"}],
        "storage": {"root": str(tmp_path)},
    }
    config = Config.model_validate(tree)
    async with control_plane(config) as plane:
        app = create_app(lambda: plane, config)
        server = uvicorn.Server(uvicorn.Config(app, port=port, log_level="warning", lifespan="off"))
        running = asyncio.create_task(server.serve())
        while not server.started:
            await asyncio.sleep(0.01)
        await asyncio.gather(*(vanish(port, number) for number in range(NUM_CLIENTS)))
        await nothing_left(plane)
        server.should_exit = True
        await running
