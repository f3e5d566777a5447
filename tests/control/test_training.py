"""Runs that cannot be created now, and can later."""

from __future__ import annotations

import asyncio
from unittest.mock import patch

import pytest

from tests.control.echo_group import EchoGroup, pass_command
from tests.control.plane import TENANT, Client, optim
from tests.control.test_keeper import Store
from tests.control.virtual_time import virtual
from twinkle_serve.control.recovery import corrupt
from twinkle_serve.protocol.errors import BackendUnavailable, Busy


@virtual
async def test_a_creation_that_met_full_results_works_once_there_is_room():
    store = Store(limits={"results_max_bytes": 10_000})
    group = EchoGroup()
    group.bytes_per_result = 6000
    async with store.opened(group) as plane:
        client = await Client(plane).open()
        run = await client.create()
        requests = [await client.submit(run, n, pass_command(f"p{n}")) for n in (1, 2)]
        await asyncio.sleep(1)
        for _ in range(2):  # as the SDK does
            with pytest.raises(Busy, match="room for results is full"):
                await client.create(1)
        assert [each.run_id for each in plane._books.runs.of_tenant(TENANT)] == [run]
        await client.result(requests[0])
        await asyncio.sleep(10)
        other = await client.create(1)
        assert other == f"{client.session}:train:1"
        await client.do(other, 1, pass_command("a"))


@virtual
async def test_results_of_others_stop_nobody_who_has_few():
    store = Store(limits={"results_max_bytes": 10_000})
    group = EchoGroup()
    group.bytes_per_result = 6000
    async with store.opened(group) as plane:
        alice, bob = await Client(plane).open(), await Client(plane, "bob").open()
        hers = await alice.create()
        for n in (1, 2):
            await alice.submit(hers, n, pass_command(f"p{n}"))
        await asyncio.sleep(1)
        with pytest.raises(Busy, match="more than your part"):
            await alice.submit(hers, 3, pass_command("p3"))
        his = await bob.create()
        assert await bob.do(his, 1, optim()) == {"history": ("create", "optim 1")}
        sampler = await plane.create_sampler("bob", bob.session, 0, "base", None)
        assert await bob.result(await bob.sample(sampler)) == ()


@virtual
async def test_a_run_that_takes_nothing_any_more_makes_no_answers_without_end():
    store = Store(limits={"results_max_bytes": 10_000})
    async with store.opened() as plane:
        client = await Client(plane).open()
        run = await client.create()
        corrupt(plane._keeper, plane._books.runs.find(run), "a reason")
        for _ in range(9):  # of a KB each, with the creation
            assert "a reason" in (await client.failure(await client.submit(run, None, optim()))).message
        with pytest.raises(Busy, match="more than your part"):
            await client.submit(run, None, optim())


@virtual
async def test_a_creation_that_met_a_full_disk_works_once_there_is_room():
    async with Store().opened() as plane:
        client = await Client(plane).open()
        full = OSError("No space left on device")
        with patch.object(plane._books.runs, "_save", side_effect=full):
            for _ in range(2):
                with pytest.raises(OSError, match="No space left"):
                    await client.create()
        assert await client.create() == f"{client.session}:train:0"


@virtual
async def test_a_server_that_shuts_down_leaves_no_run_behind():
    store = Store()
    async with store.opened() as plane:
        client = await Client(plane).open()
        await plane.close()
        with pytest.raises(BackendUnavailable, match="shutting down"):
            await client.create()
    async with store.opened() as plane:
        assert plane._books.runs.of_tenant(TENANT) == []
