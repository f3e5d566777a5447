from __future__ import annotations

import asyncio

import httpx
import pytest

from tests.gateway.scripted import ScriptedBackend
from twinkle_serve.config import Config, TenantLimits
from twinkle_serve.gateway.app import create_app
from twinkle_serve.gateway.doors import Doors
from twinkle_serve.protocol.errors import Busy

MIB = 2**20
FEW = TenantLimits(http_requests=4, bodies_bytes=4 * MIB)


def test_only_so_many_are_inside_and_each_tenant_has_a_door_of_its_own() -> None:
    doors = Doors()
    visits = [doors.visit("a", FEW) for _ in range(4)]
    for visit in visits:
        visit.__enter__()
    with pytest.raises(Busy, match="4 of your HTTP requests"), doors.visit("a", FEW):
        pass
    with doors.visit("b", FEW):
        pass
    visits[0].__exit__(None, None, None)
    with doors.visit("a", FEW):
        pass


async def test_bodies_stand_in_line_in_order_and_make_room_when_they_end() -> None:
    doors, order = Doors(), []

    async def go(name: str, num_bytes: int, leave: asyncio.Event) -> None:
        with doors.visit("a", FEW) as visit:
            await visit.hold(num_bytes)
            order.append(name)
            await leave.wait()

    first, rest = asyncio.Event(), asyncio.Event()
    sizes = [("large", 9 * MIB, first), ("x", 3 * MIB, rest), ("y", MIB, rest), ("z", MIB, rest)]
    tasks = [asyncio.create_task(go(*item)) for item in sizes]
    await asyncio.sleep(0)
    assert order == ["large"], "one that is too large for any line goes alone"
    with doors.visit("b", FEW) as other:
        await other.hold(MIB)
    first.set()
    for _ in range(5):
        await asyncio.sleep(0)
    assert order == ["large", "x", "y"]
    rest.set()
    await asyncio.gather(*tasks)
    assert order[-1] == "z"
    assert not doors._lines
    assert not doors._inside


async def test_who_gives_up_in_line_holds_nobody_up() -> None:
    doors = Doors()
    with doors.visit("a", FEW) as holder:
        await holder.hold(4 * MIB)

        async def wait() -> None:
            with doors.visit("a", FEW) as visit:
                await visit.hold(2 * MIB)

        leaver, stayer = asyncio.create_task(wait()), asyncio.create_task(wait())
        await asyncio.sleep(0)
        leaver.cancel()
        await asyncio.gather(leaver, return_exceptions=True)
    await asyncio.wait_for(stayer, 5)
    assert not doors._lines


async def test_the_sdk_is_told_to_come_again(backend: ScriptedBackend, config: Config) -> None:
    """429 with the reason; on a poll 408, because old SDKs take a 429 there for final."""
    config.limits.tenant.http_requests = 4
    config.http.poll_hold_s = 3
    backend.polls["train-1"] = None
    app = create_app(lambda: backend, config)
    transport = httpx.ASGITransport(app=app)
    headers = {"X-API-Key": "tml-a"}
    async with httpx.AsyncClient(transport=transport, base_url="http://s/api/v1", headers=headers) as client:
        body = {"request_id": "train-1"}
        polls = [asyncio.create_task(client.post("/retrieve_future", json=body)) for _ in range(4)]
        while len(backend.holds) < 4:
            await asyncio.sleep(0)
        refused = await client.get("/sessions")
        assert (refused.status_code, refused.headers["retry-after"]) == (429, "1")
        assert refused.json()["queue_state"] == "paused_rate_limit"
        assert "4 of your HTTP requests" in refused.json()["queue_state_reason"]
        fifth = await client.post("/retrieve_future", json=body)
        assert (fifth.status_code, fifth.json()["type"]) == (408, "try_again")
        assert "4 of your HTTP requests" in fifth.json()["queue_state_reason"]
        other = await client.get("/sessions", headers={"X-API-Key": "tml-b"})
        assert other.status_code == 200
        backend.settled.set()
        await asyncio.gather(*polls)
        assert (await client.get("/sessions")).status_code == 200


@pytest.mark.parametrize(
    ("limit", "path", "body", "part"),
    [
        ({"body_bytes": 1100}, "create_session", {"tags": ["x" * 2000]}, "1100"),
        (
            {"sequence_tokens": 3},
            "asample",
            {"sampling_session_id": "s", "prompt": {"chunks": [{"tokens": [1] * 4}]}},
            "at most 3",
        ),
        (
            {"datums": 1},
            "forward",
            {
                "model_id": "r",
                "forward_input": {
                    "loss_fn": "cross_entropy",
                    "data": [{"model_input": {"chunks": [{"tokens": [1]}]}, "loss_fn_inputs": {}}] * 2,
                },
            },
            "at most 1 fit",
        ),
    ],
)
async def test_limits_of_one_request(
    backend: ScriptedBackend, config: Config, limit: dict[str, int], path: str, body: object, part: str
) -> None:
    """Of the tenant they are set for only; said by 4xx, or by the promise where a seq_id is spent."""
    plain = config.limits.tenant.model_dump()
    tenant = "44b13ecf0ab7c8a9"
    app = create_app(lambda: backend, config)
    transport = httpx.ASGITransport(app=app)
    headers = {"X-API-Key": "tml-a"}
    async with httpx.AsyncClient(transport=transport, base_url="http://s/api/v1", headers=headers) as client:
        await client.post("/create_session", json={})
        tenant = backend.asked("create_session")[-1][0]

        async def said() -> str:
            answer = await client.post(f"/{path}", json=body)
            told = [f"{command.failure}" for _, _, command in backend.commands if hasattr(command, "failure")]
            return answer.text + " ".join(told) + " ".join(map(str, backend.samples))

        assert part not in await said()
        config.limits.tenants[tenant] = TenantLimits.model_validate(plain | limit)
        backend.deduped.clear()
        assert part in await said()
