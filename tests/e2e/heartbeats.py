"""Heartbeats of one session until standard input ends: ``python heartbeats.py URL KEY``.

Prints a JSON list of the seconds from when each was due to its answer. They are sent on a schedule, whatever
became of those before: a client that waits for each answer would see one late heartbeat in a stall of the
server, however many fell into it. A process of its own, because a client that is busy with hundreds of
samples would measure itself.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import sys
from collections.abc import Awaitable, Callable

import httpx

PERIOD_S = 0.05


async def beat_until(over: asyncio.Future[str], beat: Callable[[], Awaitable[None]]) -> list[float]:
    """One every PERIOD_S until ``over`` is done. Returns when all are answered, or raises what they did."""
    clock = asyncio.get_running_loop().time
    latencies: list[float] = []

    async def timed(due: float) -> None:
        await beat()
        latencies.append(clock() - due)

    began = clock()
    async with asyncio.TaskGroup() as beats:
        for number in itertools.count():
            due = began + number * PERIOD_S
            await asyncio.wait([over], timeout=max(0.0, due - clock()))
            if over.done():
                break
            beats.create_task(timed(due))
    return latencies


async def main(url: str, key: str) -> list[float]:
    # No limit of connections: a heartbeat that waited for one would measure its own client.
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=url, headers={"X-API-Key": key}, timeout=60, limits=limits) as http:
        answer = await http.post("/api/v1/create_session", json={"tags": []})
        body = {"session_id": answer.json()["session_id"]}

        async def beat() -> None:
            (await http.post("/api/v1/session_heartbeat", json=body)).raise_for_status()

        print("beating", flush=True)
        return await beat_until(asyncio.ensure_future(asyncio.to_thread(sys.stdin.read)), beat)


if __name__ == "__main__":
    print(json.dumps(asyncio.run(main(*sys.argv[1:]))))
