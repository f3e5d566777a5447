"""ModelScope tokens against a stand-in of its HTTP interface, through its own client."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from twinkle_serve.config import ModelScopeConfig
from twinkle_serve.hub.users import HubAway, HubUsers

USERS = {"ms-alice": "alice", "ms-bob": "bob", "ms-nameless": ""}
MARKER = "twinkle-explorers/members"


class Site(ThreadingHTTPServer):
    """Knows three tokens; only alice may see the marker. ``broken``: answers 500 to everything."""

    broken = False

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.seen: list[tuple[str, str]] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    server: Site

    def do_GET(self) -> None:
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        self.server.seen.append((self.path, token))
        user = USERS.get(token)
        if self.server.broken:
            self._answer(500, {"success": False, "message": "down"})
        elif user is None:
            self._answer(401, {"success": False, "code": "Unauthorized", "message": "bad token"})
        elif self.path.endswith("/users/me"):
            self._answer(200, {"success": True, "data": {"username": user}})
        elif MARKER in self.path and user == "alice":
            self._answer(200, {"success": True, "data": {"id": MARKER, "owner": "twinkle-explorers"}})
        else:
            self._answer(404, {"success": False, "code": "NotFound", "message": "no such repository"})

    def _answer(self, status: int, body: dict[str, Any]) -> None:
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def site(monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    # The operator's own token must never stand in for a caller's.
    monkeypatch.setenv("MODELSCOPE_API_TOKEN", "ms-alice")
    monkeypatch.setattr("time.sleep", lambda _: None)  # the client's pauses between its attempts
    with Site() as site:
        thread = threading.Thread(target=site.serve_forever)
        thread.start()
        yield site
        site.shutdown()
        thread.join()


def users(site: Site, **fields: Any) -> HubUsers:
    return HubUsers(ModelScopeConfig(endpoint=site.url, **fields))


def test_members_are_those_who_see_the_marker(site: Site) -> None:
    gate = users(site, marker_repo=MARKER)
    assert gate.user_of("ms-alice") == "alice"
    assert gate.user_of("ms-bob") is None
    assert {token for _, token in site.seen} == {"ms-alice", "ms-bob"}


def test_the_list_lets_in_who_is_on_it(site: Site) -> None:
    assert users(site, allow_users=["bob"]).user_of("ms-bob") == "bob"
    assert users(site, allow_users=["bob"]).user_of("ms-alice") is None
    assert users(site, allow_users=["bob"], marker_repo=MARKER).user_of("ms-alice") == "alice"


@pytest.mark.parametrize("token", ["ms-unknown", "ms-nameless"])
def test_nobodys_token_is_refused(site: Site, token: str) -> None:
    assert users(site, allow_users=["", "alice"]).user_of(token) is None
    assert {sent for _, sent in site.seen} == {token}


def test_a_broken_site_is_not_a_verdict(site: Site) -> None:
    site.broken = True
    with pytest.raises(HubAway):
        users(site, allow_users=["alice"]).user_of("ms-alice")


def test_a_site_out_of_reach_is_not_a_verdict(site: Site) -> None:
    gate = HubUsers(ModelScopeConfig(endpoint="http://127.0.0.1:9", allow_users=["alice"]))
    with pytest.raises(HubAway):
        gate.user_of("ms-alice")
