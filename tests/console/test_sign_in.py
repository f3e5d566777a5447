"""The way in: what the cookie is, what it is not, and who stays outside."""

from __future__ import annotations

from pathlib import Path

import httpx
import pytest
from starlette.requests import Request

from tests.console.conftest import KEY, sign_in
from tests.gateway.scripted import ScriptedBackend
from twinkle_serve.config import Config
from twinkle_serve.console.app import add_console
from twinkle_serve.console.sign_in import COOKIE, Seal
from twinkle_serve.console.visitors import is_operator
from twinkle_serve.gateway.app import create_app
from twinkle_serve.storage.keys import KeyStore

PAGES = ["/", "/runs/session-1:train:0", "/checkpoints", "/playground", "/cluster", "/download?path=x"]


def test_a_seal_opens_what_it_sealed_and_nothing_else() -> None:
    seal = Seal(b"a" * 32, hours=1)
    assert seal.opened(seal.sealed("tml-ключ")) == "tml-ключ"
    assert seal.opened(Seal(b"b" * 32, hours=1).sealed("tml-x")) is None
    for cookie in (None, "", "nonsense", seal.sealed("x")[:-2], "é"):
        assert seal.opened(cookie) is None


def test_a_seal_ages() -> None:
    old = Seal(b"a" * 32, hours=1)._fernet.encrypt_at_time(b"tml-x", 1_000_000).decode()
    assert Seal(b"a" * 32, hours=1).opened(old) is None


def test_the_same_key_never_gives_the_same_cookie() -> None:
    seal = Seal(b"a" * 32, hours=1)
    assert seal.sealed("tml-x") != seal.sealed("tml-x")


async def test_signing_in_sets_a_cookie_that_is_safe(stranger: httpx.AsyncClient) -> None:
    answer = await sign_in(stranger)
    assert (answer.status_code, answer.headers["location"]) == (303, "/console/")
    cookie = answer.headers["set-cookie"]
    for part in ("HttpOnly", "SameSite=strict", "Path=/console", "Max-Age=43200"):
        assert part in cookie
    assert "Secure" not in cookie, "plain http on loopback"
    assert KEY not in cookie
    assert KEY.removeprefix("tml-") not in answer.text


async def test_behind_tls_the_cookie_is_secure(stranger: httpx.AsyncClient) -> None:
    answer = await stranger.post(
        "/console/sign-in", data={"key": KEY}, headers={"x-forwarded-proto": "https"}
    )
    assert "Secure" in answer.headers["set-cookie"]


@pytest.mark.parametrize("page", PAGES)
async def test_without_a_sign_in_there_is_nothing_to_see(
    stranger: httpx.AsyncClient, backend: ScriptedBackend, page: str
) -> None:
    answer = await stranger.get("/console" + page)
    assert answer.status_code == 303
    assert answer.headers["location"].startswith("/console/sign-in")
    assert not backend.calls


@pytest.mark.parametrize("action", ["publish", "delete", "keep"])
async def test_without_a_sign_in_nothing_can_be_done(
    stranger: httpx.AsyncClient, backend: ScriptedBackend, action: str
) -> None:
    answer = await stranger.post(f"/console/checkpoints/{action}", data={"path": "x"})
    assert answer.status_code == 303
    assert not backend.calls


async def test_scripts_are_told_by_status(stranger: httpx.AsyncClient) -> None:
    assert (await stranger.get("/console/runs/session-1:train:0/curves")).status_code == 401
    assert (await stranger.post("/console/chat", json={})).status_code == 401


async def test_signing_out_removes_the_cookie(browser: httpx.AsyncClient) -> None:
    assert (await browser.get("/console/")).status_code == 200
    await browser.post("/console/sign-out")
    assert COOKIE not in browser.cookies
    assert (await browser.get("/console/")).status_code == 303


@pytest.mark.parametrize(
    ("after", "place"),
    [
        ("/console/checkpoints", "/console/checkpoints"),
        ("https://evil.example/console/", "/console/"),
        ("//evil.example/console/", "/console/"),
        ("/api/v1/sessions", "/console/"),
        ("/console/\\evil.example", "/console/"),
        ("", "/console/"),
    ],
)
async def test_after_signing_in_one_stays_here(stranger: httpx.AsyncClient, after: str, place: str) -> None:
    assert (await sign_in(stranger, next=after)).headers["location"] == place


@pytest.mark.parametrize("key", ["", "   ", "x" * 5000])
async def test_no_key_is_a_page_with_a_word(stranger: httpx.AsyncClient, key: str) -> None:
    answer = await sign_in(stranger, key)
    assert answer.status_code == 401
    assert 'role="alert"' in answer.text
    assert "set-cookie" not in answer.headers


@pytest.mark.parametrize(
    "headers",
    [
        {"sec-fetch-site": "cross-site"},
        {"sec-fetch-site": "same-site"},
        {"origin": "https://evil.example"},
        {"origin": "null"},
        {"origin": "http://[x"},
    ],
)
async def test_forms_of_other_sites_are_ignored(
    browser: httpx.AsyncClient, backend: ScriptedBackend, headers: dict[str, str]
) -> None:
    backend.calls.clear()
    for url in ("/console/checkpoints/delete", "/console/sign-out", "/console/chat"):
        answer = await browser.post(url, data={"path": "x"}, headers=headers)
        assert answer.status_code == 403
    assert not backend.asked("delete_checkpoint")
    assert not backend.samples


async def test_a_revoked_key_is_signed_out(tmp_path: Path, backend: ScriptedBackend) -> None:
    tree = {
        "models": [{"name": "m", "path": "/m"}],
        "auth": {"mode": "keys"},
        "storage": {"root": str(tmp_path)},
    }
    store = KeyStore(tmp_path)
    key = store.create("ann")
    app = create_app(lambda: backend, Config.model_validate(tree))
    add_console(app)
    identity = app.state.gateway.identity
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app=app), base_url="http://server") as client:
        assert (await sign_in(client, "tml-wrong")).status_code == 401
        assert (await sign_in(client, key)).status_code == 303
        page = await client.get("/console/")
        assert "ann" in page.text
        assert key not in page.text
        store.revoke("ann")
        identity._good.clear()  # what time would do
        assert (await client.get("/console/")).status_code == 303
    store.close()


@pytest.mark.parametrize(
    ("auth", "operators", "name", "expected"),
    [
        ("open", [], "key 1", True),
        ("open", ["key 1"], "key 1", True),
        ("open", ["key 1"], "key 2", False),
        ("keys", [], "ann", False),
        ("keys", ["ann"], "ann", True),
        ("keys", ["ann"], "bob", False),
    ],
)
def test_who_operates_the_service(auth: str, operators: list[str], name: str, expected: bool) -> None:
    tree = {
        "models": [{"name": "m", "path": "/m"}],
        "auth": {"mode": auth},
        "console": {"operators": operators},
    }
    assert is_operator(Config.model_validate(tree), name) is expected


def test_an_open_server_that_others_can_reach_has_no_operators() -> None:
    tree = {
        "models": [{"name": "m", "path": "/m"}],
        "http": {"host": "0.0.0.0"},
        "auth": {"allow_public": True},
    }
    assert not is_operator(Config.model_validate(tree), "key 1")


def test_the_cookie_lives_below_the_route_prefix() -> None:
    scope = {"type": "http", "root_path": "/serve/console", "headers": [], "scheme": "http", "path": "/"}
    scope |= {"server": ("s", 80), "query_string": b""}
    from starlette.responses import Response

    response = Response()
    Seal(b"a" * 32, 1).put(response, Request(scope), "tml-x")
    assert "Path=/serve/console" in response.headers["set-cookie"]
