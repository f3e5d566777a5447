"""Runs whose client is gone leave the disk; those whose client may come back do so later."""

from __future__ import annotations

import asyncio
from unittest.mock import patch

import pytest

from tests.control.echo_group import EchoGroup, pass_command
from tests.control.plane import TENANT, Client, optim
from tests.control.test_keeper import Store, again
from tests.control.test_service_sweep import another_model, full
from tests.control.virtual_time import virtual
from twinkle_serve.control.backend import LoadCommand, NotFound, SaveCommand, SnapshotCommand
from twinkle_serve.control.service import ControlPlane
from twinkle_serve.protocol.data import LoraSpec
from twinkle_serve.protocol.errors import Busy

RETENTION_S = 7200.0


def store_of_trained(retention_s: float | None = RETENTION_S) -> Store:
    return Store(limits={"run_retention_s": retention_s}, snapshot_every_steps=1)


async def trained(plane: ControlPlane) -> tuple[Client, str]:
    """A run of its own session, with two snapshots of itself and one to sample from."""
    client = await Client(plane).open()
    run = await client.create()
    for seq_id in (1, 3):
        await client.do(run, seq_id, pass_command(f"p{seq_id}"))
        await client.do(run, seq_id + 1, optim())
        await asyncio.sleep(5)
    await client.do(run, 5, SnapshotCommand(1))
    return client, run


async def finish(client: Client) -> None:
    await client.plane.finish_session(TENANT, client.session, {"type": "success"})


def left_of(store: Store, run: str) -> tuple[int, int]:
    """How many snapshots and entries the journal has of it."""
    return len(store.journal.rows[run].snapshots), len(store.journal.rows[run].entries)


@virtual
async def test_a_finished_session_leaves_checkpoints_and_results_and_nothing_else():
    store = store_of_trained()
    async with store.opened() as plane:
        client, run = await trained(plane)
        saved = await client.do(run, 6, SaveCommand("weights", "last"))
        last = await client.submit(run, 7, pass_command("last"))
        assert len(store.files) == 3
        await finish(client)
        assert await client.result(last) == ("create", "p1", "optim 1", "p3", "optim 1", "last")
        await asyncio.sleep(60)
        assert store.files == {}
        assert left_of(store, run) == (0, 0)
        assert plane.gauges()["base"]["resident_adapters"] == 0
        assert await client.result(last) == ("create", "p1", "optim 1", "p3", "optim 1", "last")
        with pytest.raises(NotFound, match="only its checkpoints remain"):
            await client.submit(run, 8, optim())
        other = await Client(plane).open()
        birth = await plane.create_model_from(TENANT, other.session, 0, saved["path"], True, None, {})
        assert (await other.result(birth))["path"] == saved["path"]
    async with store.opened() as plane:
        assert await again(client, plane).result(last) == ["create", "p1", "optim 1", "p3", "optim 1", "last"]
        assert run not in plane._keeper.kept
        assert len(store.files) == 1, "the one that was born from it"


@virtual
async def test_what_a_finished_session_was_promised_is_done_first():
    """A pass that takes ten minutes, one that waits for a hole in front of it, and a save."""
    store = Store()
    async with store.opened(EchoGroup(pass_s=600)) as plane:
        client = await Client(plane).open()
        run = await client.create()
        slow = await client.submit(run, 1, pass_command("slow"))
        save = await client.submit(run, 2, SaveCommand("weights", "n"))
        behind = await client.submit(run, 4, pass_command("behind"))
        await finish(client)
        assert await client.result(slow) == ("create", "slow")
        assert (await client.result(save))["path"].endswith("/n")
        assert "did not arrive" in (await client.failure(behind)).message
        await asyncio.sleep(60)
        assert store.files == {}
        assert left_of(store, run) == (0, 0)


@virtual
async def test_a_birth_that_waits_takes_place_though_its_session_is_finished():
    store = Store()
    store.config.limits.tenant.live_runs = 1
    async with store.opened() as plane:
        first, second = await Client(plane).open(), await Client(plane).open()
        run = await first.create()
        birth = await plane.create_model(TENANT, second.session, 0, "base", LoraSpec(8), {})
        await finish(second)
        await asyncio.sleep(60)
        assert (await plane.poll(TENANT, birth, 0.0)).state == "pending"
        await finish(first)
        assert (await second.result(birth))["model_id"] != run
        await asyncio.sleep(60)
        assert left_of(store, run) == (0, 0)
        assert left_of(store, f"{second.session}:train:0") == (0, 0)


@virtual
async def test_a_load_that_cannot_be_written_to_disk_is_told_by_the_unload():
    store = Store()
    async with store.opened() as plane:
        client = await Client(plane).open()
        run = await client.create()
        path = (await client.do(run, 1, SaveCommand("weights", "n")))["path"]
        cover = store.journal.cover
        store.journal.cover = lambda *_: full()
        load = await client.submit(run, 2, LoadCommand(path, False))
        await asyncio.sleep(100)
        assert (await plane.poll(TENANT, load, 0.0)).state == "pending"
        await finish(client)
        assert (await client.result(load))["path"] == path
        store.journal.cover = cover
        await asyncio.sleep(60)
        assert store.files == {}


@virtual
async def test_a_server_that_dies_in_the_middle_of_it_does_it_again():
    store = store_of_trained()
    async with store.opened() as plane:
        client, run = await trained(plane)
        await finish(client)
        with patch.object(store.journal, "retire", lambda *_: asyncio.Future()):
            await asyncio.sleep(60)
        assert plane._books.runs.find(run).record.unloaded
        assert left_of(store, run)[0] == 2
    assert len(store.files) == 2
    async with store.opened() as plane:
        await asyncio.sleep(60)
        assert store.files == {}
        assert left_of(store, run) == (0, 0)


@virtual
async def test_a_snapshot_of_an_unloaded_run_that_is_still_there_goes_at_the_next_start():
    store = store_of_trained()
    async with store.opened() as plane:
        client, _ = await trained(plane)
        with patch.object(plane._books.samplers, "evict", lambda group: []):  # it dies before that
            await finish(client)
            await asyncio.sleep(60)
    assert len(store.files) == 1
    async with store.opened() as plane:
        assert store.files == {}


@virtual
async def test_an_expired_session_may_come_back_until_its_time_is_over():
    store = store_of_trained()
    async with store.opened() as plane:
        client, run = await trained(plane)
        sleeper, slept = await trained(plane)
        await asyncio.sleep(RETENTION_S - 10)
        assert len(store.files) >= 4
        await plane.heartbeat(TENANT, sleeper.session)
        await asyncio.sleep(100)
        assert left_of(store, run) == (0, 0)
        assert await sleeper.do(slept, 6, pass_command("b")) == (
            *("create", "p1", "optim 1", "p3", "optim 1"),
            "b",
        )
        assert await plane.heartbeat(TENANT, client.session)
        with pytest.raises(NotFound, match="only its checkpoints remain"):
            await client.submit(run, 6, optim())
        await asyncio.sleep(RETENTION_S + 1000)
        assert store.files == {}


@virtual
async def test_restarts_do_not_make_an_expired_session_young():
    store = store_of_trained()
    async with store.opened() as plane:
        _, run = await trained(plane)
        await asyncio.sleep(0.6 * RETENTION_S)
    async with store.opened() as plane:
        await asyncio.sleep(0.3 * RETENTION_S)
        assert left_of(store, run)[0] > 0
        await asyncio.sleep(0.2 * RETENTION_S)
        assert left_of(store, run) == (0, 0)
        assert store.files == {}


@virtual
async def test_without_a_limit_runs_of_expired_sessions_stay():
    store = store_of_trained(None)
    async with store.opened() as plane:
        client, run = await trained(plane)
        await asyncio.sleep(10 * RETENTION_S)
        assert await client.do(run, 6, pass_command("b"))


@virtual
async def test_a_run_whose_model_is_served_no_more_leaves_the_disk_too():
    store = store_of_trained()
    async with store.opened() as plane:
        client, run = await trained(plane)
        await asyncio.sleep(100)  # all of it is covered
    async with another_model(store) as plane:
        await finish(again(client, plane))
        await asyncio.sleep(60)
        assert left_of(store, run) == (0, 0)


@virtual
async def test_what_is_left_of_a_corrupted_run_has_its_time():
    store = store_of_trained()
    async with store.opened() as plane:
        client, run = await trained(plane)
    for snapshot in store.journal.rows[run].snapshots:
        store.files.pop(f"/files/{snapshot.file}", None)
    async with store.opened() as plane:
        client = again(client, plane)
        await client.poll(await client.submit(run, 6, pass_command("b")))
        assert plane._books.runs.find(run).record.corrupted
        await finish(client)
        await asyncio.sleep(RETENTION_S - 1000)
        assert left_of(store, run)[1] > 0
        await asyncio.sleep(RETENTION_S)
        assert left_of(store, run) == (0, 0)


@virtual
async def test_many_runs_end_some_at_a_time():
    store = Store()
    async with store.opened() as plane:
        client = await Client(plane).open()
        for number in range(25):
            await client.create(number)
        saved = []
        put_run = store.catalog.put_run
        store.catalog.put_run = lambda record: put_run(record) or saved.append(plane._clock.now())
        plane._books.runs._save = store.catalog.put_run
        await finish(client)
        await asyncio.sleep(60)
        assert [saved.count(at) for at in sorted(set(saved))] == [10, 10, 5]


@virtual
async def test_new_runs_are_put_off_while_the_disk_is_full():
    store = Store(disk_reserve_bytes=1000)
    async with store.opened() as plane:
        client = await Client(plane).open()
        run = await client.create()
        path = (await client.do(run, 1, SaveCommand("weights", "n")))["path"]
        store.state_files.free = 999
        with pytest.raises(Busy, match=r"disk is full.*disk_reserve_bytes is 1000"):
            await client.create(1)
        with pytest.raises(Busy):
            await plane.create_model_from(TENANT, client.session, 1, path, False, None, {})
        assert await client.do(run, 2, pass_command("a")) == ("create", "a")
        store.state_files.free = 1000
        assert await client.create(1)
