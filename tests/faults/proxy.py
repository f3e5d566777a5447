"""An HTTP proxy that loses, repeats and delays: what a bad network does between the SDK and the server.

Knows nothing of what it carries. A lost answer is a connection that is closed after the server has done the
work; the same seed hurts the same requests in the order in which they come.
"""

from __future__ import annotations

import asyncio
import random
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

import httpx

_HOP = {"connection", "keep-alive", "transfer-encoding", "content-length", "host", "content-encoding"}


class Proxy:
    """Forwards to ``upstream``; about one request in ``every`` suffers."""

    def __init__(self, upstream: str, seed: int, every: int = 4) -> None:
        self.counts: Counter[str] = Counter()
        self._upstream = upstream
        self._rng = random.Random(seed)
        self._every = every
        self.port = 0

    async def handle(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
            first, *lines = head.split("\r\n")
            method, path, _ = first.split(" ")
            headers = dict(line.split(": ", 1) for line in lines if ": " in line)
            length = int(next((v for k, v in headers.items() if k.lower() == "content-length"), 0))
            body = await reader.readexactly(length)
            answer = await self._forward(method, path, headers, body)
            if answer is not None:
                writer.write(_encoded(answer))
                await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError, httpx.HTTPError):
            pass
        finally:
            writer.close()

    async def _forward(
        self, method: str, path: str, headers: dict[str, str], body: bytes
    ) -> httpx.Response | None:
        fate = self._rng.choice(["lost", "twice", "late"] + ["fine"] * 3 * (self._every - 1))
        self.counts[fate] += 1
        kept = {name: value for name, value in headers.items() if name.lower() not in _HOP}
        kept |= {name: value for name, value in headers.items() if name.lower() == "content-encoding"}
        if fate == "late":
            await asyncio.sleep(self._rng.uniform(0.1, 1.0))
        async with httpx.AsyncClient(base_url=self._upstream, timeout=90) as client:
            answer = await client.request(method, path, headers=kept, content=body)
            if fate == "twice":
                answer = await client.request(method, path, headers=kept, content=body)
        return None if fate == "lost" else answer


def _encoded(answer: httpx.Response) -> bytes:
    lines = [f"HTTP/1.1 {answer.status_code} {answer.reason_phrase}"]
    lines += [f"{name}: {value}" for name, value in answer.headers.items() if name.lower() not in _HOP]
    lines += [f"content-length: {len(answer.content)}", "connection: close"]
    return "\r\n".join([*lines, "", ""]).encode("latin-1") + answer.content


@contextmanager
def bad_network(upstream: str, seed: int) -> Iterator[Proxy]:
    """A proxy in a thread of its own while the block lasts; it listens on 127.0.0.1:proxy.port."""
    proxy = Proxy(upstream, seed)
    loop = asyncio.new_event_loop()

    async def serve() -> asyncio.Server:
        server = await asyncio.start_server(proxy.handle, "127.0.0.1", 0)
        proxy.port = server.sockets[0].getsockname()[1]
        return server

    server = loop.run_until_complete(serve())
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    try:
        yield proxy
    finally:

        async def stop() -> None:
            server.close()
            rest = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
            for task in rest:
                task.cancel()
            await asyncio.gather(*rest, return_exceptions=True)

        asyncio.run_coroutine_threadsafe(stop(), loop).result(10)
        loop.call_soon_threadsafe(loop.stop)
        thread.join(10)
        loop.close()
