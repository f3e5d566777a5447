"""What the tick loop does when things go wrong underneath it."""

from __future__ import annotations

import asyncio
import logging
from unittest.mock import patch

import pytest

from tests.control.echo_group import EchoGroup, pass_command
from tests.control.plane import TENANT, Client, control_plane, make_config, optim
from tests.control.test_keeper import Store, again
from tests.control.virtual_time import virtual
from twinkle_serve.control.backend import LoadCommand, NotFound, SaveCommand, SnapshotCommand, UnloadCommand
from twinkle_serve.protocol.work import TickReport


def crash_once(group: EchoGroup, phase: str) -> None:
    """The next tick with passes dies in ``phase``."""

    def when(tick, current) -> bool:
        if tick.passes and current == phase:
            group.crash_when = lambda tick, phase: False
            return True
        return False

    group.crash_when = when


@pytest.mark.parametrize("phase", ["passes", "optim", "save"])
def test_a_lost_group_fails_what_was_in_it_and_comes_back(tmp_path, phase):
    @virtual
    async def scenario():
        group = EchoGroup()
        async with control_plane(tmp_path, group) as plane:
            client = await Client(plane).open()
            run, other = await client.create(0), await client.create(1)
            path = (await client.do(run, 1, SaveCommand("weights", "n")))["path"]
            crash_once(group, phase)
            doomed = [
                await client.submit(run, 2, pass_command("a")),
                await client.submit(run, 3, optim()),
                await client.submit(run, 4, SaveCommand("weights", "m")),
                await client.submit(run, 5, SnapshotCommand(0)),
            ]
            failures = [(await client.poll(request)).failure for request in doomed]
            assert failures[-1].category == "server"
            assert "workers that held this run's adapter died" in failures[-1].message
            assert not await plane.healthy()
            await asyncio.sleep(10)
            assert await plane.healthy()
            assert group.rebuilds == 1
            for lost in (run, other):
                failure = await client.failure(await client.submit(lost, 6 if lost == run else 1, optim()))
                assert "adapter died" in failure.message
            await client.do(run, 7, LoadCommand(path, True))
            assert await client.do(run, 8, pass_command("b")) == ("create", "load", "b")
            assert await client.do(run, 9, SaveCommand("weights", "m", overwrite=True))
            assert await client.create(2)

    scenario()


@virtual
async def test_a_lost_group_loses_samples_which_clients_submit_again(tmp_path):
    group = EchoGroup()
    async with control_plane(tmp_path, group) as plane:
        client = await Client(plane).open()
        run = await client.create()
        snapshot = (await client.do(run, 1, SnapshotCommand(0)))["sampling_session_id"]
        sampler = await plane.create_sampler(TENANT, client.session, 1, "base", None)
        long = {"max_tokens": 1000, "num_samples": 20}
        samples = [await client.sample(s, n, **long) for n in range(3) for s in (snapshot, sampler)]
        queued = await client.sample(sampler, 9, num_samples=200)
        crash_once(group, "passes")
        await asyncio.sleep(1)
        polls = [asyncio.create_task(client.poll(request)) for request in [*samples, queued]]
        await client.submit(run, 2, pass_command("a"))
        assert {(await poll).state for poll in polls} == {"gone"}
        with pytest.raises(NotFound):
            await client.sample(snapshot, 10)
        assert await client.result(await client.sample(sampler, 10)) == ()


@virtual
async def test_a_group_that_dies_without_work_is_rebuilt_at_once(tmp_path):
    group = EchoGroup()
    group.delay_saves = 50
    async with control_plane(tmp_path, group) as plane:
        client = await Client(plane).open()
        save = await client.submit(await client.create(), 1, SaveCommand("weights", "n"))
        await asyncio.sleep(0.5)
        group.crash_when = lambda tick, phase: group.rebuilds == 0
        assert (await client.failure(save)).category == "server"
        await asyncio.sleep(10)
        assert await plane.healthy()


@virtual
async def test_rebuilding_is_tried_until_it_works_and_commands_wait(tmp_path, caplog):
    group = EchoGroup()
    group.rebuild_failures = 3
    async with control_plane(tmp_path, group) as plane:
        client = await Client(plane).open()
        run = await client.create()
        crash_once(group, "passes")
        await client.failure(await client.submit(run, 1, pass_command("a")))
        started = asyncio.get_running_loop().time()
        assert await client.create(1)
        assert 15 <= asyncio.get_running_loop().time() - started < 25
        assert caplog.text.count("no machine") >= 3


@virtual
async def test_a_bug_in_the_group_fails_its_tick_and_no_more(tmp_path, caplog):
    group = EchoGroup()
    async with control_plane(tmp_path, group) as plane:
        client = await Client(plane).open()
        run = await client.create()
        group.raise_in_tick = RuntimeError("boom")
        failure = await client.failure(await client.submit(run, 1, pass_command("a")))
        assert failure.category == "server"
        assert "boom" not in failure.message
        assert "boom" in caplog.text
        assert await client.do(run, 2, pass_command("b")) == ("create", "b")


@virtual
async def test_a_bug_after_some_answers_fails_only_the_others(tmp_path, caplog):
    class Breaking(EchoGroup):
        async def run(self, tick):
            async for message in super().run(tick):
                yield message
                if len(tick.saves) == 2:
                    raise RuntimeError("boom")

    async with control_plane(tmp_path, Breaking()) as plane:
        client = await Client(plane).open()
        run = await client.create()
        saves = [await client.submit(run, n, SaveCommand("weights", f"n{n}")) for n in (2, 1)]
        assert (await client.result(saves[1]))["path"].endswith("n1")
        assert (await client.failure(saves[0])).category == "server"
        assert "boom" in caplog.text
        for seq_id, name in ((3, "n1"), (4, "n2")):
            await client.do(run, seq_id, SaveCommand("weights", name, overwrite=True))
            assert not plane._books.checkpoints.is_saving(f"tinker://{run}/weights/{name}")


@virtual
async def test_a_request_that_the_group_forgets_fails(tmp_path):
    class Forgetful(EchoGroup):
        async def run(self, tick):
            async for message in super().run(tick):
                if isinstance(message, TickReport) or not tick.passes:
                    yield message

    async with control_plane(tmp_path, Forgetful()) as plane:
        client = await Client(plane).open()
        run = await client.create()
        failure = await client.failure(await client.submit(run, 1, pass_command("a")))
        assert "no answer" in failure.message
        assert (await client.do(run, 2, optim()))["history"][-1] == "optim 1"


@virtual
async def test_a_sample_that_the_group_forgets_fails_and_the_ticks_end(tmp_path):
    group = EchoGroup()
    async with control_plane(tmp_path, group) as plane:
        client = await Client(plane).open()
        sampler = await plane.create_sampler(TENANT, client.session, 0, "base", None)
        sample = await client.sample(sampler, max_tokens=100)
        await asyncio.sleep(0.3)
        group.active.clear()
        assert "no answer" in (await client.failure(sample)).message
        ticks = len(group.ticks)
        await asyncio.sleep(10)
        assert len(group.ticks) == ticks


@virtual
async def test_a_full_disk_fails_the_save_and_frees_the_name(tmp_path, caplog):
    async with control_plane(tmp_path) as plane:
        catalog = plane._books.checkpoints._catalog
        put, catalog.put_checkpoint = catalog.put_checkpoint, _raise(OSError("No space left on device"))
        client = await Client(plane).open()
        run = await client.create()
        failure = await client.failure(await client.submit(run, 1, SaveCommand("weights", "n")))
        assert failure.category == "server"
        assert "No space left" in caplog.text
        assert await plane.list_checkpoints(TENANT, run, None, 0) == ([], 0)
        catalog.put_checkpoint = put
        assert await client.do(run, 2, pass_command("a")) == ("create", "a")
        assert await client.do(run, 3, SaveCommand("weights", "n"))


@virtual
async def test_a_bug_while_preparing_one_command_spares_the_others(tmp_path, caplog):
    caplog.set_level(logging.ERROR)
    async with control_plane(tmp_path) as plane:
        plane._books.checkpoints._catalog.directory_for = _raise(RuntimeError("boom"))
        client = await Client(plane).open()
        run, other = await client.create(0), await client.create(1)
        save = await client.submit(run, 1, SaveCommand("weights", "n"))
        assert await client.do(other, 1, pass_command("a")) == ("create", "a")
        assert (await client.failure(save)).category == "server"
        assert "boom" in caplog.text


@virtual
async def test_an_unload_that_cannot_be_saved_fails_alone_and_for_good(caplog):
    """Not even the deaths of the group and of the server do it after all."""
    store = Store(snapshot_every_s=1e9)
    group = EchoGroup(pass_s=1.0)
    async with store.opened(group) as plane:
        client, other = await Client(plane).open(), await Client(plane, "bob").open()
        run, his = await client.create(), await other.create()
        await client.do(run, 1, pass_command("a"))
        with patch.object(plane._books.runs, "_save", side_effect=OSError("No space left on device")):
            await other.submit(his, 1, pass_command("x"))  # the others wait for its tick, and share the next
            unload = await client.submit(run, 2, UnloadCommand())
            assert await other.do(his, 2, pass_command("y")) == ("create", "x", "y")
            assert (await client.failure(unload)).category == "server"
        assert "No space left" in caplog.text
        crash_once(group, "passes")
        assert await other.do(his, 3, pass_command("z")) == ("create", "x", "y", "z")
        assert await client.do(run, 3, pass_command("b")) == ("create", "a", "b")
        assert not store.journal.rows[run].snapshots
    async with store.opened() as plane:
        client = again(client, plane)
        assert (await client.failure(unload)).category == "server"
        assert await client.do(run, 4, pass_command("c")) == ("create", "a", "b", "c")
        assert await client.do(run, 5, UnloadCommand()) == {"model_id": run}


@virtual
async def test_a_file_of_a_snapshot_that_cannot_be_removed_is_nobodys_trouble(caplog):
    store = Store()
    async with store.opened() as plane:
        client = await Client(plane).open()
        run, other = await client.create(0), await client.create(1)
        await client.do(run, 1, SnapshotCommand(0))
        with patch.object(store.state_files, "remove", side_effect=OSError("Read-only file system")):
            await client.do(run, 2, UnloadCommand())
            assert await client.do(other, 1, pass_command("a")) == ("create", "a")
        assert "Read-only" in caplog.text


def _raise(error: Exception):
    def function(*args, **kwargs):
        raise error

    return function


@virtual
async def test_decoding_is_short_while_training_waits_and_longer_when_none_does(tmp_path):
    group = EchoGroup()
    async with control_plane(tmp_path, group, make_config()) as plane:
        client = await Client(plane).open()
        run = await client.create()
        sampler = await plane.create_sampler(TENANT, client.session, 0, "base", None)
        sample = await client.sample(sampler, max_tokens=300)
        for n in range(5):
            await client.do(run, n + 1, pass_command("p"))
        await client.result(sample)
    training = {round(tick.decode_budget_s, 3) for tick in group.ticks if tick.passes}
    alone = {round(tick.decode_budget_s, 3) for tick in group.ticks if not tick.passes}
    assert training == {0.05}
    assert alone == {0.0, 0.2}


@virtual
async def test_an_idle_control_plane_runs_no_ticks(tmp_path):
    group = EchoGroup()
    async with control_plane(tmp_path, group) as plane:
        client = await Client(plane).open()
        await client.do(await client.create(), 1, optim())
        ticks = len(group.ticks)
        await asyncio.sleep(3600)
        assert len(group.ticks) == ticks
