"""What Serve's HTTP proxy answers while no application is there: "try again" instead of "not found".

Knows that such a 404 is plain text and that ours are JSON or a page. Does not know any route. The proxy
listens before the application is deployed and after it is removed; to the SDK a 404 for a result is final.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from starlette.middleware import Middleware

from twinkle_serve.cluster.proxy_lanes import lanes

IMPORT_PATH = "twinkle_serve.cluster.proxy_hook:middlewares"
# A client that polls would otherwise come again at once.
_WAIT_S = 0.5
_OURS = (b"application/json", b"text/html")
_BODY = json.dumps({"detail": "the service is starting or stopping; try again"}).encode()

Message = MutableMapping[str, Any]
Send = Callable[[Message], Awaitable[None]]


def middlewares() -> list[Middleware]:
    """For RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH."""
    return [lanes(), Middleware(TryAgain)]


class TryAgain:
    """ASGI middleware: a 404 that is neither JSON nor a page becomes a 503."""

    def __init__(self, app: Any) -> None:
        self._app = app

    async def __call__(self, scope: Message, receive: Any, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        replaced = False

        async def forward(message: Message) -> None:
            nonlocal replaced
            if message["type"] == "http.response.start" and _is_serves_own(message):
                replaced = True
                await asyncio.sleep(_WAIT_S)
                headers = [
                    (b"content-type", b"application/json"),
                    (b"content-length", str(len(_BODY)).encode()),
                ]
                await send({"type": "http.response.start", "status": 503, "headers": headers})
                await send({"type": "http.response.body", "body": _BODY})
            elif not replaced:
                await send(message)

        await self._app(scope, receive, forward)


def _is_serves_own(message: Message) -> bool:
    headers = {bytes(name).lower(): bytes(value) for name, value in message.get("headers", [])}
    return message["status"] == 404 and not headers.get(b"content-type", b"").startswith(_OURS)
