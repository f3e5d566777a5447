"""Traces to download and metrics that a program reports."""

from __future__ import annotations

from typing import Any

import httpx
import pytest

from tests.gateway.scripted import ScriptedBackend

RUN = "session-1:train:0"


async def report(client: httpx.AsyncClient, **body: Any) -> httpx.Response:
    return await client.post(f"/training_runs/{RUN}/metrics", json=body)


async def test_reported_metrics_reach_the_backend(
    client: httpx.AsyncClient, backend: ScriptedBackend
) -> None:
    answer = await report(client, step=3, metrics={"reward": 0.5, "length": 12})
    assert answer.status_code == 204
    ((_, run_id, step, values),) = backend.asked("report_metrics")
    assert (run_id, step, values) == (RUN, 3.0, {"reward": 0.5, "length": 12.0})


async def test_without_a_step_the_runs_own_counts(
    client: httpx.AsyncClient, backend: ScriptedBackend
) -> None:
    assert (await report(client, metrics={"reward": 0.5})).status_code == 204
    assert backend.asked("report_metrics")[0][2] is None


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({"step": "soon", "metrics": {"reward": 1}}, "step"),
        ({"step": -1, "metrics": {"reward": 1}}, "step"),
        ({"step": 1}, "metrics"),
        ({"step": 1, "metrics": {}}, "1 to 32"),
        ({"step": 1, "metrics": {f"m{i}": 1 for i in range(33)}}, "1 to 32"),
        ({"step": 1, "metrics": {"reward": "high"}}, "metrics.reward"),
        ({"step": 1, "metrics": {"reward": True}}, "metrics.reward"),
        ({"step": 1, "metrics": {"reward": None}}, "metrics.reward"),
        ({"step": 1, "metrics": {"x" * 65: 1}}, "64"),
        ({"step": 1, "metrics": {"": 1}}, "64"),
    ],
)
async def test_what_is_wrong_is_named(
    client: httpx.AsyncClient, backend: ScriptedBackend, body: dict[str, Any], words: str
) -> None:
    answer = await report(client, **body)
    assert answer.status_code == 400
    assert words in answer.json()["detail"]
    assert not backend.asked("report_metrics")


async def test_a_trace_is_fetched_by_its_link_without_a_key(client: httpx.AsyncClient) -> None:
    answer = (await client.get("/sessions/session-1/trace_export")).json()
    assert answer["status"] == "ready"
    del client.headers["X-API-Key"]
    trace = await client.get(answer["url"])
    assert trace.json() == {"traceEvents": [{"name": "passes"}]}


async def test_a_link_is_for_one_session_and_tenant(client: httpx.AsyncClient) -> None:
    url = (await client.get("/sessions/session-1/trace_export")).json()["url"]
    assert (await client.get(url.replace("session-1", "session-2"))).status_code == 401
    tenant = url.partition("tenant=")[2].partition("&")[0]
    assert (await client.get(url.replace(tenant, "somebody"))).status_code == 401


async def test_another_tenants_session_has_no_trace(client: httpx.AsyncClient) -> None:
    await client.get("/sessions/session-1")  # whose it is
    answer = await client.get("/sessions/session-1/trace_export", headers={"X-API-Key": "tml-other"})
    assert answer.status_code == 404
