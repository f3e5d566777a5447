"""How a request follows what it asked for: one held poll for each prompt, and one look at its client."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import httpx
import pytest

from tests.gateway.scripted import ScriptedBackend
from twinkle_serve.config import Config, HttpConfig
from twinkle_serve.control.backend import Poll
from twinkle_serve.gateway.app import create_app
from twinkle_serve.gateway.openai import following
from twinkle_serve.protocol.data import SampleResult
from twinkle_serve.protocol.openai import MAX_CHOICES
from twinkle_serve.protocol.work import Failure

NUM_PROMPTS = 50
NUM_LOOKS = 3 * NUM_PROMPTS
BODY = {"model": "Qwen/Tiny", "prompt": [[5, 6]] * NUM_PROMPTS}


async def look_often_then_leave(backend: ScriptedBackend) -> tuple[int, list[int]]:
    """Send the prompts, and go away after many looks. How often the client was looked at, and the status."""
    config = Config.model_validate({"models": [{"name": "Qwen/Tiny", "path": "/models/tiny"}]})
    app = create_app(lambda: backend, config)
    sent = [{"type": "http.request", "body": json.dumps(BODY).encode(), "more_body": False}]
    looks, statuses = 0, []

    async def receive() -> dict[str, Any]:
        nonlocal looks
        if sent:
            return sent.pop()
        looks += 1
        if looks < NUM_LOOKS:
            await asyncio.Event().wait()  # nothing to say; the look is given up
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        if message["type"] == "http.response.start":
            statuses.append(message["status"])

    scope = {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.3"},
        "method": "POST",
        "path": "/v1/completions",
        "root_path": "",
        "query_string": b"",
        "headers": [(b"authorization", b"Bearer tml-x")],
    }
    await asyncio.wait_for(app(scope, receive, send), 20)  # type: ignore[arg-type]
    await asyncio.gather(*following._cancelling)
    return looks, statuses


async def test_many_pending_prompts_are_polled_once_each_however_often_the_client_is_looked_at(
    backend: ScriptedBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(following, "_LOOK_EVERY_S", 0.001)
    looks, statuses = await look_often_then_leave(backend)
    assert looks == NUM_LOOKS
    assert statuses == [499]
    assert len(backend.asked("poll")) == NUM_PROMPTS
    assert set(backend.holds) == {HttpConfig().poll_hold_s}
    assert len(backend.asked("cancel")) == NUM_PROMPTS


async def test_the_first_failure_is_the_end_of_all(
    client: httpx.AsyncClient, backend: ScriptedBackend
) -> None:
    backend.polls["sample-1"] = Poll("done", failure=Failure("diverged"))
    answer = await client.post("/completions", json=BODY)
    assert answer.status_code == 400
    assert answer.json()["error"]["message"] == "diverged"
    await asyncio.gather(*following._cancelling)
    assert len(backend.asked("cancel")) == NUM_PROMPTS


async def test_as_many_prompts_as_an_answer_may_have_choices(
    client: httpx.AsyncClient, backend: ScriptedBackend
) -> None:
    too_many = MAX_CHOICES // 4 + 1
    for num_prompts, n, message in (
        (MAX_CHOICES + 1, 1, f"at most {MAX_CHOICES} items"),
        (too_many, 4, f"prompt is a list of {too_many} and n is 4"),
    ):
        body = BODY | {"prompt": [[5]] * num_prompts, "n": n}
        answer = await client.post("/completions", json=body)
        assert answer.status_code == 400
        assert message in answer.json()["error"]["message"]
    assert backend.samples == []
    for number in range(MAX_CHOICES):
        backend.polls[f"sample-{number}"] = Poll("done", value=SampleResult(()))
    answer = await client.post("/completions", json=BODY | {"prompt": [[5]] * MAX_CHOICES})
    assert answer.status_code == 200
    assert len(backend.samples) == MAX_CHOICES
