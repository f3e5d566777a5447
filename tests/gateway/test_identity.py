from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import httpx
import pytest

from tests.gateway.scripted import ScriptedBackend
from twinkle_serve.config import Config
from twinkle_serve.console.app import add_console
from twinkle_serve.gateway.app import create_app
from twinkle_serve.gateway.identity import OpenIdentity, api_key
from twinkle_serve.protocol.errors import Unauthorized

# Answered without a key: a probe, links that carry their own proof, and what people see before they sign in.
OPEN = {
    "/api/v1/healthz",
    "/api/v1/downloads/{run_id}/{kind}/{name}/{file}",
    "/api/v1/sessions/{session_id}/trace",
    "/",
    *(
        prefix + page
        for prefix in ("", "/v1")
        for page in ("/docs", "/docs/oauth2-redirect", "/openapi.json")
    ),
    "/console/sign-in",
    "/console/sign-out",
    "/console/static",
}


@pytest.mark.parametrize(
    ("headers", "key"),
    [
        ({"x-api-key": "tml-a"}, "tml-a"),
        ({"x-api-key": " tml-a "}, "tml-a"),
        ({"authorization": "Bearer ms-1"}, "ms-1"),
        ({"authorization": "bearer ms-1"}, "ms-1"),
        ({"authorization": "ms-1"}, "ms-1"),
        ({"twinkle-authorization": "Bearer ms-1"}, "ms-1"),
        ({"x-api-key": "", "authorization": "Bearer ms-1"}, "ms-1"),
        ({"x-api-key": "tml-a", "authorization": "Bearer ms-1"}, "tml-a"),
        ({"authorization": "Bearer "}, None),
        ({}, None),
    ],
)
def test_where_a_key_is_found(headers: dict[str, str], key: str | None) -> None:
    assert api_key(headers) == key


async def test_each_key_is_a_tenant_that_does_not_show_the_key() -> None:
    identity = OpenIdentity()
    one = await identity.identify({"x-api-key": "tml-secret"})
    same = await identity.identify({"authorization": "Bearer tml-secret"})
    other = await identity.identify({"x-api-key": "tml-other"})
    assert one.tenant == same.tenant != other.tenant
    assert "secret" not in one.tenant + one.name
    with pytest.raises(Unauthorized):
        await identity.identify({})


async def test_every_route_needs_a_key(backend: ScriptedBackend, config: Config) -> None:
    """From the route table, with all that is mounted, so that a new route is covered when it is born."""
    app = create_app(lambda: backend, config)
    add_console(app)
    table = list(routes_of(app.routes))
    assert len(table) > 70
    assert {path for _, path in table} >= OPEN
    transport = httpx.ASGITransport(app=app)
    async with httpx.AsyncClient(transport=transport, base_url="http://server") as client:
        for method, path in table:
            if path in OPEN:
                continue
            answer = await client.request(method, path)
            if path.startswith("/console/") and answer.status_code == 303:
                assert answer.headers["location"].startswith("/console/sign-in?"), (method, path)
                continue
            assert answer.status_code == 401, (method, path)
            if not path.startswith("/v1/"):
                assert answer.json()["detail"]
    assert backend.calls == []


def routes_of(routes: Iterable[Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """(method, path) of each, also of what is mounted, and however the framework keeps routers."""
    for route in routes:
        if hasattr(route, "effective_candidates"):
            yield from routes_of(route.effective_candidates(), prefix)
        elif getattr(route, "routes", None):
            yield from routes_of(route.routes, prefix + route.path)
        else:
            for method in sorted(getattr(route, "methods", None) or {"GET"}):
                yield method, prefix + route.path


async def test_another_tenants_objects_are_absent(
    client: httpx.AsyncClient, backend: ScriptedBackend
) -> None:
    run, session = "session-1:train:0", "session-1"
    assert (await client.post("/get_info", json={"model_id": run})).status_code == 200
    assert (await client.post("/session_heartbeat", json={"session_id": session})).status_code == 200
    stranger = {"X-API-Key": "tml-stranger"}
    for method, path, body in (
        ("POST", "/get_info", {"model_id": run}),
        ("POST", "/optim_step", {"model_id": run, "seq_id": 1, "adam_params": {}}),
        ("POST", "/forward", {"model_id": run, "seq_id": 1}),
        ("GET", f"/training_runs/{run}", None),
        ("GET", f"/sessions/{session}", None),
        ("POST", "/session_heartbeat", {"session_id": session}),
        ("POST", f"/sessions/{session}/finish", {}),
    ):
        answer = await client.request(method, path, json=body, headers=stranger)
        assert answer.status_code == 404, path


async def test_what_is_remembered_of_a_run_is_remembered_for_its_owner_only(
    client: httpx.AsyncClient, backend: ScriptedBackend
) -> None:
    body = {"model_id": "session-1:train:0", "seq_id": 1}
    for _ in range(3):
        assert (await client.post("/forward", json=body)).status_code == 200
    assert len(backend.asked("run_info")) == 1
    answer = await client.post("/forward", json=body, headers={"X-API-Key": "tml-stranger"})
    assert answer.status_code == 404
