"""One file has the JSON lines of all processes, and no key in it."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from twinkle_serve.control.metrics import tenant_hash
from twinkle_serve.gateway.identity import OpenIdentity
from twinkle_serve.testing.server import RunningServer

pytestmark = pytest.mark.slow
KEY = "tml-e2e"  # of sdk_program.py


async def test_requests_are_logged_by_all_who_touch_them(
    server: RunningServer, sdk_program_seen: Callable[..., dict[str, Any]]
) -> None:
    sdk_program_seen(server.url, "llama")
    text = (server.log.parent / "server.jsonl").read_text()
    lines = [json.loads(line) for line in text.splitlines()]
    tenant = tenant_hash((await OpenIdentity().identify({"x-api-key": KEY})).tenant)
    ours = [line for line in lines if line.get("tenant") == tenant]
    assert {line["component"] for line in ours} == {"ingress", "coordinator"}
    steps = [line for line in ours if line["message"] == "optim_step: done"]
    assert steps
    assert all(line["run"].partition(":train:")[1] for line in steps)
    assert all(line["request"].startswith("train-") for line in steps)
    assert len({(line["run"], line["seq"]) for line in steps}) == len(steps)
    routes = {line["route"] for line in ours if "route" in line}
    assert {"/api/v1/create_session", "/api/v1/retrieve_future"} <= routes
    assert KEY not in text
