"""What clients are told at their start."""

from __future__ import annotations

import httpx
import pytest

from tests.gateway.scripted import ScriptedBackend
from twinkle_serve.config import Config
from twinkle_serve.gateway.app import create_app


@pytest.mark.parametrize(("batches", "told"), [([64], 128), ([8, 1], 64), ([64, 512], 1024)])
async def test_a_client_keeps_as_many_samples_in_flight_as_the_largest_sampler_takes_in(
    backend: ScriptedBackend, batches: list[int], told: int
) -> None:
    models = [
        {"name": f"m{i}", "path": "/models/tiny", "sampler": {"max_batch": batch}}
        for i, batch in enumerate(batches)
    ]
    app = create_app(lambda: backend, Config.model_validate({"models": models}))
    async with httpx.AsyncClient(
        transport=httpx.ASGITransport(app), base_url="http://server/api/v1", headers={"X-API-Key": "tml-x"}
    ) as client:
        config = (await client.post("/client/config", json={})).json()
    assert config["sample_max_concurrent_requests"] == told
