"""Counts, times, logs and traces what goes through the gateway, whatever it is.

Knows routes and statuses. Does not know bodies, keys or what a route does.
"""

from __future__ import annotations

import logging
import re
import secrets
import time
from collections.abc import Callable
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from twinkle_serve.control.metrics import Meter, tenant_hash
from twinkle_serve.control.spans import TRACE_PARENT, Span

logger = logging.getLogger(__name__)
_TRACE_PARENT = re.compile(r"00-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}")


class Observed:
    """ASGI middleware. ``export``: where spans go; without it requests get none."""

    def __init__(self, app: ASGIApp, meter: Meter, export: Callable[[Span], None] | None = None) -> None:
        self._app = app
        self._meter = meter
        self._export = export

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        status = 500
        started, began = time.time(), time.perf_counter()
        above = _parent_of(scope)
        own = None if self._export is None and above is None else _child_of(above)
        token = TRACE_PARENT.set(own)

        async def noting(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, noting)
        finally:
            TRACE_PARENT.reset(token)
            seconds = time.perf_counter() - began
            route = route_of(scope)
            self._note(route, status, seconds, scope)
            if self._export is not None:
                args: dict[str, str | float] = {"status": status}
                parents = () if above is None else (above,)
                name = f"{scope['method']} {route}"
                span = Span(name, started, started + seconds, frozenset(), "gateway", args, parents, own)
                self._export(span)

    def _note(self, route: str, status: int, seconds: float, scope: Scope) -> None:
        self._meter.add("http_requests", 1, route=route, status=str(status))
        self._meter.observe("http_seconds", seconds, route=route)
        tenant = scope.get("state", {}).get("tenant")
        extra: dict[str, Any] = {"route": route, "status": status, "seconds": round(seconds, 4)}
        if tenant is not None:
            extra["tenant"] = tenant_hash(tenant)
        level = logging.ERROR if status >= 500 and status != 503 else logging.DEBUG
        logger.log(level, "%s %s: %d", scope["method"], route, status, extra=extra)


def route_of(scope: Scope) -> str:
    """The path with its parameters' names in the place of their values: ids must make no series of their
    own. The route itself knows only its part of the path below a router or a mounted application."""
    if "route" not in scope:
        return "unmatched"
    path: str = scope["path"]
    rest = ""
    for name, value in reversed(scope.get("path_params", {}).items()):
        path, _, after = path.rpartition(f"/{value}")
        rest = f"/{{{name}}}{after}{rest}"
    return path + rest


def _parent_of(scope: Scope) -> str | None:
    for name, value in scope["headers"]:
        if name == b"traceparent" and _TRACE_PARENT.fullmatch(text := value.decode("latin-1")):
            return str(text)
    return None


def _child_of(parent: str | None) -> str:
    trace = parent.split("-")[1] if parent is not None else secrets.token_hex(16)
    return f"00-{trace}-{secrets.token_hex(8)}-01"
