"""Two lanes in Serve's HTTP proxy: a crowd of samples waits at its door, heartbeats pass it.

One proxy serves a node at a few milliseconds a request, first come first served, so five hundred samples that
arrive at once would keep a heartbeat waiting for seconds. Knows which routes come in crowds. Does not know
what they mean, and keeps nothing but a count.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, MutableMapping
from contextlib import asynccontextmanager
from typing import Any

from starlette.middleware import Middleware

Message = MutableMapping[str, Any]
Application = Callable[[Message, Any, Any], Awaitable[None]]

WIDTH = 8
"""Requests of the crowd that are worked on at once: more than one proxy keeps up with only wait further on,
where a heartbeat waits behind them."""
_HELD_AFTER_S = 0.05
"""A poll without an answer by then is being held, which is no work."""
_POLLS = frozenset({"retrieve_future", "retrieve_futures"})
_CROWDS = _POLLS | {"asample", "telemetry"}


def lanes() -> Middleware:
    return Middleware(Lanes)


class Lanes:
    """ASGI middleware. Those that wait go in the order they came."""

    def __init__(self, app: Application) -> None:
        self._app = app
        self._room = asyncio.Semaphore(WIDTH)

    async def __call__(self, scope: Message, receive: Any, send: Any) -> None:
        route = scope["path"].rpartition("/")[2] if scope["type"] == "http" else ""
        if route not in _CROWDS:
            await self._app(scope, receive, send)
            return
        async with self._place(_HELD_AFTER_S if route in _POLLS else None):
            await self._app(scope, receive, send)

    @asynccontextmanager
    async def _place(self, patience_s: float | None) -> Any:
        """A place among those that are worked on: for the block, or for ``patience_s`` if that is less."""
        await self._room.acquire()
        left = False

        def leave() -> None:
            nonlocal left
            if not left:
                left = True
                self._room.release()

        if patience_s is not None:
            asyncio.get_running_loop().call_later(patience_s, leave)
        try:
            yield
        finally:
            leave()
