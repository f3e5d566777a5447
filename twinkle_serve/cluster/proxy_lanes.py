"""Two lanes in Serve's HTTP proxy: a crowd of samples waits at its door, heartbeats pass it.

One proxy serves a node at a few milliseconds a request, first come first served, so five hundred samples that
arrive at once would keep a heartbeat waiting for seconds. Knows which routes come in crowds. Does not know
what they mean, and keeps nothing but a count.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, MutableMapping
from contextlib import asynccontextmanager
from typing import Any

from starlette.middleware import Middleware

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Application = Callable[[Message, Receive, Any], Awaitable[None]]

WIDTH = 4
"""Requests of the crowd that are worked on at once. That keeps the proxy busy, which is the slowest on their
way; more of them would only wait further on, where a heartbeat waits behind them."""
_HELD_AFTER = 2.0
"""A poll without an answer after so many times what a submission takes is being held, which is no work."""
_LONGEST_S = 1.0
"""Nobody keeps a place for longer, whatever becomes of the request."""
_MOST_READ = 2**20
"""Bytes of a body that are read before a place is taken: a client that sends slowly keeps none."""
_FIRST_GUESS_S = 0.02
_NEWEST = 0.1
"""The weight of the newest submission in what one usually takes."""
_POLLS = frozenset({"retrieve_future", "retrieve_futures"})
_CROWDS = _POLLS | {"asample", "telemetry"}


def lanes() -> Middleware:
    return Middleware(Lanes)


class Lanes:
    """ASGI middleware. Those that wait go in the order they came."""

    def __init__(self, app: Application) -> None:
        self._app = app
        self._room = asyncio.Semaphore(WIDTH)
        self._usual_s = _FIRST_GUESS_S

    async def __call__(self, scope: Message, receive: Receive, send: Any) -> None:
        route = scope["path"].rpartition("/")[2] if scope["type"] == "http" else ""
        if route not in _CROWDS:
            await self._app(scope, receive, send)
            return
        receive = await _read_first(receive)
        async with self._place(may_be_held=route in _POLLS):
            await self._app(scope, receive, send)

    @asynccontextmanager
    async def _place(self, may_be_held: bool) -> Any:
        """A place among those that are worked on, given back when the block ends or the request is held."""
        await self._room.acquire()
        loop = asyncio.get_running_loop()
        began = loop.time()
        left = False

        def leave() -> None:
            nonlocal left
            if not left:
                left = True
                self._room.release()

        patience_s = min(_LONGEST_S, _HELD_AFTER * self._usual_s) if may_be_held else _LONGEST_S
        loop.call_later(patience_s, leave)
        try:
            yield
            if not may_be_held:
                spent_s = min(_LONGEST_S, loop.time() - began)
                self._usual_s += _NEWEST * (spent_s - self._usual_s)
        finally:
            leave()


async def _read_first(receive: Receive) -> Receive:
    """Wait for the body, or for as much as is read ahead; what gives it again and then goes on."""
    messages: deque[Message] = deque()
    size, is_whole = 0, False
    while not is_whole and size < _MOST_READ:
        message = await receive()
        messages.append(message)
        size += len(message.get("body", b""))
        is_whole = message["type"] != "http.request" or not message.get("more_body", False)

    async def again() -> Message:
        return messages.popleft() if messages else await receive()

    return again
