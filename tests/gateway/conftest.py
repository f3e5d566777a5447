"""The application over a scripted backend, reached in-process as the SDK would reach it."""

from __future__ import annotations

from collections.abc import AsyncIterator

import httpx
import pytest

from tests.gateway.scripted import ScriptedBackend
from twinkle_serve.config import Config
from twinkle_serve.gateway.app import create_app


@pytest.fixture
def config() -> Config:
    return Config.model_validate(
        {"models": [{"name": "Qwen/Tiny", "path": "/models/tiny"}], "http": {"poll_hold_s": 0.05}}
    )


@pytest.fixture
def backend() -> ScriptedBackend:
    return ScriptedBackend()


@pytest.fixture
async def client(backend: ScriptedBackend, config: Config) -> AsyncIterator[httpx.AsyncClient]:
    app = create_app(lambda: backend, config)
    # A 500 is looked at as a response, as a client would.
    transport = httpx.ASGITransport(app=app, raise_app_exceptions=False)
    async with httpx.AsyncClient(
        transport=transport, base_url="http://server/api/v1", headers={"X-API-Key": "tml-test"}
    ) as client:
        yield client
