"""What the middleware counts, traces and logs about each request."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator

import httpx
import pytest

from tests.gateway.scripted import ScriptedBackend
from twinkle_serve.config import Config
from twinkle_serve.control.metrics import Tally, tenant_hash
from twinkle_serve.control.spans import TRACE_PARENT, Span
from twinkle_serve.gateway.app import create_app

KEY = "tml-a-very-secret-key"
PARENT = f"00-{'ab' * 16}-{'cd' * 8}-01"


class Recording(ScriptedBackend):
    """Also remembers the trace that a call belongs to."""

    def _note(self, method: str, *arguments: object) -> None:
        self.traces = [*getattr(self, "traces", []), TRACE_PARENT.get()]
        super()._note(method, *arguments)


@pytest.fixture
def tally() -> Tally:
    return Tally()


@pytest.fixture
def spans() -> list[Span]:
    return []


@pytest.fixture
def backend() -> Recording:
    return Recording()


@pytest.fixture
async def client(
    backend: Recording, config: Config, tally: Tally, spans: list[Span]
) -> AsyncIterator[httpx.AsyncClient]:
    app = create_app(lambda: backend, config, meter=tally, export_span=spans.append)
    transport = httpx.ASGITransport(app=app, raise_app_exceptions=False)
    async with httpx.AsyncClient(
        transport=transport, base_url="http://server", headers={"X-API-Key": KEY}
    ) as client:
        yield client


async def test_requests_are_counted_by_pattern_and_status(client: httpx.AsyncClient, tally: Tally) -> None:
    for run_id in ("s1:train:0", "s2:train:0", "unknown"):
        await client.get(f"/api/v1/training_runs/{run_id}")
    await client.get("/api/v1/healthz")
    await client.get("/v1/models")
    await client.get("/nowhere/at/all")
    route = "/api/v1/training_runs/{run_id}"
    assert tally.total("http_requests", route=route, status="200") == 2
    assert tally.total("http_requests", route=route, status="404") == 1
    assert tally.total("http_requests", route="/api/v1/healthz", status="200") == 1
    assert tally.total("http_requests", route="/v1/models", status="200") == 1
    assert tally.total("http_requests", route="unmatched", status="404") == 1
    assert len(tally.observed["http_seconds", (("route", route),)]) == 3


async def test_ids_that_look_like_the_path_make_no_series(client: httpx.AsyncClient, tally: Tally) -> None:
    for run_id in ("a", "api", "training_runs", "v1", "weights"):
        await client.delete(f"/api/v1/training_runs/{run_id}/checkpoints/weights/{run_id}")
    routes = {dict(labels)["route"] for name, labels in tally.totals if name == "http_requests"}
    assert routes == {"/api/v1/training_runs/{run_id}/checkpoints/{kind}/{name}"}


async def test_a_failure_is_counted_as_500(
    client: httpx.AsyncClient, backend: Recording, tally: Tally
) -> None:
    backend.error = RuntimeError("bug")
    await client.get("/api/v1/sessions")
    assert tally.total("http_requests", route="/api/v1/sessions", status="500") == 1


async def test_a_callers_trace_goes_on_to_the_backend(
    client: httpx.AsyncClient, backend: Recording, spans: list[Span]
) -> None:
    await client.get("/api/v1/sessions", headers={"traceparent": PARENT})
    (span,) = spans
    assert span.name == "GET /api/v1/sessions"
    assert span.parents == (PARENT,)
    assert span.own is not None
    assert span.own.split("-")[1] == "ab" * 16, "the same trace"
    assert span.own != PARENT
    assert backend.traces == [span.own]


@pytest.mark.parametrize("parent", ["", "00-xyz", PARENT + "-more", PARENT.upper()])
async def test_a_malformed_traceparent_is_ignored(
    client: httpx.AsyncClient, spans: list[Span], parent: str
) -> None:
    await client.get("/api/v1/sessions", headers={"traceparent": parent})
    assert spans[0].parents == ()


async def test_without_an_exporter_nothing_is_traced(config: Config) -> None:
    backend = Recording()
    transport = httpx.ASGITransport(app=create_app(lambda: backend, config))
    async with httpx.AsyncClient(transport=transport, base_url="http://s", headers={"X-API-Key": KEY}) as c:
        await c.get("/api/v1/sessions")
    assert backend.traces == [None]


async def test_a_log_line_has_the_tenants_hash_and_no_key(
    client: httpx.AsyncClient, caplog: pytest.LogCaptureFixture, spans: list[Span]
) -> None:
    with caplog.at_level(logging.DEBUG, "twinkle_serve"):
        await client.get("/api/v1/sessions?api_key=" + KEY)
    (record,) = (r for r in caplog.records if r.name.endswith("observing"))
    tenant = record.__dict__["tenant"]
    assert (record.__dict__["route"], record.__dict__["status"]) == ("/api/v1/sessions", 200)
    assert len(tenant) == len(tenant_hash("x"))
    assert KEY not in str(record.__dict__)
    assert KEY not in str(spans)
