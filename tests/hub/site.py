"""A stand-in of ModelScope: whose tokens there are, who sees the marker, and repositories that take uploads.

Knows the requests that ModelScope's own client sends, and remembers each with its token.
"""

from __future__ import annotations

import base64
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

MARKER = "twinkle-explorers/members"


class Site(ThreadingHTTPServer):
    """users: token to name; only members may see the marker. ``broken``: answers 500 to everything,
    ``broken_legacy``: to what the older interface is asked.
    ``refusal``: what it says to who would create a repository, with a 403. repositories: name to its files,
    and ``visibility`` to what it was created with."""

    daemon_threads = True

    def __init__(self, users: dict[str, str], members: tuple[str, ...] = ("alice",)) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.users, self.members = users, members
        self.broken = self.broken_legacy = False
        self.refusal = ""
        self.seen: list[tuple[str, str]] = []
        self.repositories: dict[str, dict[str, bytes]] = {}
        self.visibility: dict[str, int] = {}
        self.blobs: dict[str, bytes] = {}
        self.commits = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


@contextmanager
def running_site(users: dict[str, str], members: tuple[str, ...] = ("alice",)) -> Iterator[Site]:
    with Site(users, members) as site:
        thread = threading.Thread(target=site.serve_forever)
        thread.start()
        try:
            yield site
        finally:
            site.shutdown()
            thread.join()


class _Handler(BaseHTTPRequestHandler):
    server: Site

    def do_GET(self) -> None:
        user = self._user()
        if user is None:
            return
        path = self.path.split("?")[0]
        if path.endswith("/users/me"):
            return self._answer(200, {"success": True, "data": {"username": user}})
        if MARKER in path and user in self.server.members:
            found = {"id": MARKER, "owner": MARKER.split("/")[0]}
            return self._answer(200, {"success": True, "data": found})
        for name in self.server.repositories:
            if name in path and name.startswith(f"{user}/"):
                found = {"id": name, "Path": name.split("/")[0], "Name": name.split("/")[1], "Files": []}
                return self._answer(200, {"Code": 200, "Success": True, "Data": found, "data": found})
        self._answer(404, {"success": False, "code": "NotFound", "message": "no such repository"})

    def do_POST(self) -> None:
        user, body = self._user(), self._body()
        if user is None:
            return
        path = self.path.split("?")[0]
        if path == "/api/v1/models":
            name = f"{body['Path']}/{body['Name']}"
            refusal = self.server.refusal or ("not your namespace" if body["Path"] != user else "")
            if refusal:
                return self._answer(403, {"Code": 403, "Success": False, "Message": refusal})
            if name in self.server.repositories:
                return self._answer(409, {"Code": 10010101001, "Success": False, "Message": "exists"})
            self.server.repositories[name] = {}
            self.server.visibility[name] = body["Visibility"]
            return self._answer(200, {"Code": 200, "Success": True, "Data": {"Name": name}})
        match = re.match(r"/api/v1/repos/models/([^/]+/[^/]+)/(info/lfs|commit)/", path)
        if match is None or match[1] not in self.server.repositories or not match[1].startswith(f"{user}/"):
            return self._answer(404, {"Code": 404, "Success": False, "Message": "no such repository"})
        if match[2] == "commit":
            return self._commit(match[1], body)
        objects = [
            {
                "oid": item["oid"],
                "actions": {"upload": {"href": f"{self.server.url}/blob/{item['oid']}"}},
            }
            for item in body["objects"]
        ]
        self._answer(200, {"Code": 200, "Success": True, "Data": {"objects": objects}})

    def do_PUT(self) -> None:
        if self._user() is not None:
            self.server.blobs[self.path.rpartition("/")[2]] = self._raw()
            self._answer(200, {"Code": 200, "Success": True, "Data": {}})

    def _commit(self, name: str, body: dict[str, Any]) -> None:
        self.server.commits += 1
        for action in body["actions"]:
            content = (
                self.server.blobs[action["sha256"]]
                if action["type"] == "lfs"
                else base64.b64decode(action["content"])
            )
            self.server.repositories[name][action["path"]] = content
        self._answer(200, {"Code": 200, "Success": True, "Data": {"oid": "c0ffee"}})

    def _user(self) -> str | None:
        """Who asks; None after having answered that nobody may."""
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        self.server.seen.append((self.path, token))
        user = self.server.users.get(token)
        if self.server.broken or (self.server.broken_legacy and self.path.startswith("/api/")):
            self._answer(500, {"success": False, "message": "down"})
            return None
        if user is None:
            self._answer(401, {"success": False, "code": "Unauthorized", "message": "bad token"})
        return user

    def _raw(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def _body(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self._raw() or b"{}")
        return found

    def _answer(self, status: int, body: dict[str, Any]) -> None:
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        pass
