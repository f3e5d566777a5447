"""The console behind Ray Serve: any replica knows who is signed in, and curves are those of the real run."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import httpx
import pytest

from twinkle_serve.testing.server import RunningServer

pytestmark = pytest.mark.slow
KEY = "tml-e2e"  # of sdk_program.py


def test_a_run_of_the_sdk_is_there_with_its_curves(
    server: RunningServer, run_sdk_program: Callable[..., dict[str, Any]]
) -> None:
    run_sdk_program(server.url, "llama")
    with httpx.Client(base_url=server.url, timeout=60) as browser:
        assert "llama" in browser.get("/").text
        assert browser.get("/console").is_redirect
        answer = browser.post("/console/sign-in", data={"key": KEY})
        assert answer.headers["location"] == "/console/"
        for _ in range(8):  # two replicas, of which either may answer
            page = browser.get("/console/")
            assert page.status_code == 200
        link = re.search(r'href="(/console/runs/[^"]+)"', page.text)
        assert link is not None
        curves = browser.get(f"{link[1]}/curves").json()
        assert curves["num_steps"] >= 1
        assert len(curves["steps"]["learning_rate"]) == curves["num_steps"]
        assert any(value is not None for value in curves["steps"]["loss"])
        assert "llama" in browser.get("/console/cluster").text
        trace = browser.get("/api/v1/sessions", headers={"X-API-Key": KEY}).json()["sessions"][0]
        export = browser.get(f"/api/v1/sessions/{trace}/trace_export", headers={"X-API-Key": KEY}).json()
        names = {event["name"] for event in browser.get(export["url"]).json()["traceEvents"]}
        assert {"waiting", "forward_backward", "optim_step", "passes", "optim"} <= names
        browser.post("/console/sign-in", data={"key": "tml-somebody-else"})
        assert link[1] not in browser.get("/console/").text
        assert browser.get(link[1]).status_code == 404
