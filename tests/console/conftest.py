"""The console over a scripted backend, reached in-process as a browser would reach it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest

from tests.gateway.scripted import ScriptedBackend
from twinkle_serve.config import Config
from twinkle_serve.console.app import add_console
from twinkle_serve.gateway.app import create_app

KEY = "tml-alice-secret"
RUN = "session-1:train:0"
PATH = f"tinker://{RUN}/sampler_weights/final"


def insight(**status: Any) -> dict[str, Any]:
    steps = {"step": [1.0, 2.0], "loss": [2.5, None], "learning_rate": [0.1, 0.1], "tokens": [10.0, 10.0]}
    return {
        "version": 7,
        "num_steps": 2,
        "total_tokens": 20,
        "loss": 2.5,
        "steps": steps,
        "reported": {"step": [1.0], "reward": [0.5]},
        "status": {"state": "idle", "num_waiting": 0} | status,
    }


def cluster() -> dict[str, Any]:
    return {
        "models": [
            {
                "name": "Qwen/Tiny",
                "arch": "x",
                "healthy": True,
                "num_slots": 3,
                "slots": [{"slot": 1, "run": "abcd1234"}],
                "num_ticks": 12,
                "recoveries": ["2026-01-02T03:04:05Z"],
                "gauges": {"resident_adapters": 1, "paged_host_bytes": 2_500_000, "surprise": 5},
                "shares": [{"tenant": "abcd1234", "tokens": 20, "share": 1.0}],
            }
        ],
        "sessions": 1,
        "promises": {"pending": 2, "kept": 3},
        "journal": {"lag_seconds": 0.25, "bytes": 1000, "stalled": None},
    }


def checkpoint(path: str = PATH, **fields: Any) -> dict[str, Any]:
    return {
        "checkpoint_id": "sampler_weights/final",
        "checkpoint_type": "sampler",
        "time": "2026-01-02T03:04:05Z",
        "tinker_path": path,
        "size_bytes": 123_456,
        "public": False,
        "user_metadata": {},
    } | fields


@pytest.fixture
def config() -> Config:
    return Config.model_validate({"models": [{"name": "Qwen/Tiny", "path": "/models/tiny"}]})


@pytest.fixture
def backend() -> ScriptedBackend:
    backend = ScriptedBackend(insight=insight(), cluster=cluster())
    backend.checkpoints.append(checkpoint())
    return backend


@pytest.fixture
async def stranger(backend: ScriptedBackend, config: Config) -> AsyncIterator[httpx.AsyncClient]:
    """A browser in which nobody is signed in."""
    app = create_app(lambda: backend, config, signing_secret=b"s" * 32)
    add_console(app)
    transport = httpx.ASGITransport(app=app, raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://server") as client:
        yield client


async def sign_in(client: httpx.AsyncClient, key: str = KEY, **form: str) -> httpx.Response:
    return await client.post("/console/sign-in", data={"key": key} | form)


@pytest.fixture
async def browser(stranger: httpx.AsyncClient) -> httpx.AsyncClient:
    """A browser that is signed in."""
    assert (await sign_in(stranger)).status_code == 303
    return stranger
