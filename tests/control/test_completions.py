"""One poll for all samples of a client: each end is told once, nothing that ended is left out."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from tests.control.echo_group import EchoGroup
from tests.control.plane import TENANT, Client, control_plane
from tests.control.virtual_time import virtual
from twinkle_serve.control.backend import Ended, NotFound
from twinkle_serve.control.completions import CLONE_SIZE
from twinkle_serve.control.service import ControlPlane
from twinkle_serve.protocol.work import Failure

LONG = 10_000


async def open_sampler(plane: ControlPlane) -> tuple[Client, str]:
    client = await Client(plane).open()
    return client, await plane.create_sampler(TENANT, client.session, 0, "base", None)


async def poll(
    plane: ControlPlane, sampler: str, cursor: int = 0, timeout_s: float = 30.0, clone: int = 0
) -> tuple[list[Ended], int]:
    found = await plane.poll_samples(TENANT, sampler, clone, cursor, timeout_s)
    assert found is not None
    return list(found[0]), found[1]


@virtual
async def test_every_sample_is_told_once_in_the_order_they_end(tmp_path: Path) -> None:
    async with control_plane(tmp_path) as plane:
        client, sampler = await open_sampler(plane)
        lengths = [40, 400, 1, 200]
        ids = [await client.sample(sampler, n, max_tokens=count) for n, count in enumerate(lengths)]
        told: list[Ended] = []
        cursor = 0
        while len(told) < len(ids):
            more, cursor = await poll(plane, sampler, cursor)
            assert more
            told += more
        by_length = [request for _, request in sorted(zip(lengths, ids, strict=True))]
        assert told == [Ended(request, True) for request in by_length]
        for request in ids:
            await client.result(request)


@virtual
async def test_what_ended_before_the_first_poll_is_told_too(tmp_path: Path) -> None:
    async with control_plane(tmp_path) as plane:
        client, sampler = await open_sampler(plane)
        ids = [await client.sample(sampler, n) for n in range(3)]
        for request in ids:
            await client.result(request)
        told, _ = await poll(plane, sampler)
        assert {ended.request_id for ended in told} == set(ids)


@virtual
async def test_an_answer_that_got_lost_is_given_again_until_its_cursor_comes_back(tmp_path: Path) -> None:
    async with control_plane(tmp_path) as plane:
        client, sampler = await open_sampler(plane)
        await client.result(await client.sample(sampler, 0))
        first, cursor = await poll(plane, sampler)
        assert await poll(plane, sampler) == (first, cursor)
        assert await poll(plane, sampler, cursor, 0) == ([], cursor)
        assert (await poll(plane, sampler, 0, 0))[0] == []


@virtual
async def test_a_poll_is_held_until_something_ends_and_no_longer_than_asked(tmp_path: Path) -> None:
    async with control_plane(tmp_path) as plane:
        client, sampler = await open_sampler(plane)
        loop = asyncio.get_running_loop()
        request = await client.sample(sampler, 0, max_tokens=LONG)
        began = loop.time()
        told, cursor = await poll(plane, sampler, timeout_s=0.5)
        assert (told, loop.time() - began) == ([], pytest.approx(0.5))
        told, _ = await poll(plane, sampler, cursor, timeout_s=1000)
        assert [ended.request_id for ended in told] == [request]
        assert loop.time() - began < 900


@virtual
async def test_failed_cancelled_and_lost_samples_have_ended_as_well(tmp_path: Path) -> None:
    group = EchoGroup()
    async with control_plane(tmp_path, group) as plane:
        client, sampler = await open_sampler(plane)
        bad, _ = await plane.sample(TENANT, sampler, 0, Failure("no such thing"))
        cancelled = await client.sample(sampler, 1, max_tokens=LONG)
        lost = await client.sample(sampler, 2, max_tokens=LONG)
        told, cursor = await poll(plane, sampler)
        assert told == [Ended(bad, False)]
        await plane.cancel(TENANT, cancelled)
        told, cursor = await poll(plane, sampler, cursor)
        assert told == [Ended(cancelled, False)]
        group.crash_when = lambda tick, phase: group.rebuilds == 0
        told, _ = await poll(plane, sampler, cursor, 1000)
        assert told == [Ended(lost, False)]
        assert (await plane.poll(TENANT, lost, 0)).state == "gone"


@virtual
async def test_copies_of_a_client_and_other_tenants_hear_nothing_of_each_other(tmp_path: Path) -> None:
    async with control_plane(tmp_path) as plane:
        client, sampler = await open_sampler(plane)
        mine = await client.sample(sampler, 0)
        copy = await client.sample(sampler, 7 * CLONE_SIZE + 3)
        await asyncio.sleep(1)
        assert [e.request_id for e in (await poll(plane, sampler))[0]] == [mine]
        assert [e.request_id for e in (await poll(plane, sampler, clone=7))[0]] == [copy]
        with pytest.raises(NotFound):
            await plane.poll_samples("bob", sampler, 0, 0, 0)


@virtual
async def test_samples_of_a_client_that_polls_for_all_are_not_abandoned_until_it_stops(
    tmp_path: Path,
) -> None:
    group = EchoGroup()
    async with control_plane(tmp_path, group) as plane:
        client, sampler = await open_sampler(plane)
        request = await client.sample(sampler, 0, max_tokens=10**7)
        cursor = 0
        for _ in range(12):
            _, cursor = await poll(plane, sampler, cursor, 30)
            await plane.heartbeat(TENANT, client.session)
        assert (await plane.poll(TENANT, request, 0)).state == "pending"
        waiting = asyncio.ensure_future(poll(plane, sampler, cursor, 10_000))
        await asyncio.sleep(500)
        assert not waiting.done()
        waiting.cancel()
        await plane.heartbeat(TENANT, client.session)
        await asyncio.sleep(400)
        assert (await plane.poll(TENANT, request, 0)).state == "gone"


@virtual
async def test_who_waits_for_samples_of_an_earlier_life_is_told(tmp_path: Path) -> None:
    async with control_plane(tmp_path, url=None) as plane:
        client, sampler = await open_sampler(plane)
        await client.sample(sampler, 0, max_tokens=LONG)
        _, cursor = await poll(plane, sampler, 0, 0.1)
        assert cursor > 0
    async with control_plane(tmp_path, url=None) as plane:
        for old in (cursor, 0):
            assert await plane.poll_samples(TENANT, sampler, 0, old, 30) is None
            assert await plane.poll_samples(TENANT, sampler, 0, old, 0) is not None
        await Client(plane).sample(sampler, 1)
        told, fresh = await poll(plane, sampler)
        assert len(told) == 1
        assert fresh > cursor
        assert await plane.poll_samples(TENANT, sampler, 0, cursor, 30) is None
