"""What clients were told stays true: loads, saves and failures, over deaths of the group and restarts."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from tests.control.echo_group import EchoGroup, pass_command
from tests.control.plane import TENANT, Client
from tests.control.test_keeper import Store, again
from tests.control.virtual_time import virtual
from twinkle_serve.control.backend import LoadCommand, SaveCommand, UnloadCommand
from twinkle_serve.control.service import ControlPlane
from twinkle_serve.protocol.errors import BackendUnavailable
from twinkle_serve.protocol.work import Failure, Outcome


class SlowDisk(EchoGroup):
    """Snapshots are not whole while ``is_stuck``."""

    is_stuck = False

    def _write(self, tick: Any) -> Any:
        held, self.writing = (self.writing, []) if self.is_stuck else ([], self.writing)
        outcomes = super()._write(tick)
        self.writing = [*held, *self.writing]
        return outcomes


class FullDisk(EchoGroup):
    """The next ``num_full`` snapshots find no room."""

    num_full = 0

    def _write(self, tick: Any) -> Any:
        failed = []
        if self.num_full and self.writing:
            self.num_full -= 1
            failed = [
                Outcome(each, failure=Failure("no room", "server")) for each, _, _ in self.writing if each
            ]
            self.writing = []
        return [*failed, *super()._write(tick)]


def dies_at_next_pass(group: EchoGroup) -> None:
    left = [1]
    group.crash_when = lambda tick, phase: bool(tick.passes and left and left.pop())


async def saved(plane: ControlPlane) -> tuple[Client, str, str]:
    """A client, its run that holds "a", and a checkpoint of that; then the run goes on."""
    client = await Client(plane).open()
    run = await client.create()
    await client.do(run, 1, pass_command("a"))
    path = (await client.do(run, 2, SaveCommand("weights", "one")))["path"]
    await client.do(run, 3, pass_command("b"))
    return client, run, path


async def state(client: Client, run: str, seq_id: int) -> tuple[str, ...]:
    return tuple(await client.do(run, seq_id, pass_command("look", backward=False)))


@virtual
async def test_a_load_is_told_once_a_snapshot_has_it_and_nothing_follows_before():
    store, group = Store(snapshot_every_s=1e9), SlowDisk()
    async with store.opened(group) as plane:
        client, run, path = await saved(plane)
        group.is_stuck = True
        requests = [await client.submit(run, 4, LoadCommand(path, False))]
        requests.append(await client.submit(run, 5, pass_command("c")))
        await asyncio.sleep(20)
        assert group.slots[0].history == ["create", "a", "load"]
        assert [(await plane.poll(TENANT, each, 0)).state for each in requests] == ["pending"] * 2
        group.is_stuck = False
        assert await client.result(requests[0]) == {"model_id": run, "path": path}
        assert store.journal.rows[run].snapshots[0].covered == 4
        assert await client.result(requests[1]) == ("create", "a", "load", "c")


@pytest.mark.parametrize(("num_full", "words"), [(0, "is being written"), (1, "cannot be written")])
@virtual
async def test_a_poll_says_why_a_load_and_what_follows_it_wait(num_full, words):
    store, group = Store(snapshot_every_s=1e9), FullDisk() if num_full else SlowDisk()
    async with store.opened(group) as plane:
        client, run, path = await saved(plane)
        group.is_stuck, group.num_full = True, num_full
        requests = [await client.submit(run, 4, LoadCommand(path, False))]
        requests.append(await client.submit(run, 5, pass_command("c")))
        await asyncio.sleep(10)
        polls = [await plane.poll(TENANT, each, 0) for each in requests]
        assert [poll.queue_state for poll in polls] == ["paused_capacity"] * 2
        assert all(words in poll.queue_reason for poll in polls)
        group.is_stuck = False
        assert await client.result(requests[1]) == ("create", "a", "load", "c")


@virtual
async def test_a_load_does_not_wait_because_an_earlier_snapshot_failed():
    store, group = Store(snapshot_every_s=1), FullDisk()
    async with store.opened(group) as plane:
        client, run, path = await saved(plane)
        group.num_full = 1
        await asyncio.sleep(5)
        assert group.num_full == 0
        began_at = asyncio.get_running_loop().time()
        await client.do(run, 4, LoadCommand(path, False))
        assert asyncio.get_running_loop().time() - began_at < 2


class Breaks(EchoGroup):
    """A bug of the group is met in its tick that loads, after that."""

    async def run(self, tick: Any) -> Any:
        async for message in super().run(tick):
            yield message
        if tick.loads:
            raise RuntimeError("a bug")


@virtual
async def test_a_load_that_is_done_is_told_so_whatever_else_goes_wrong_in_its_tick():
    store = Store(snapshot_every_s=1e9)
    async with store.opened(Breaks()) as plane:
        client, run, path = await saved(plane)
        assert await client.do(run, 4, LoadCommand(path, False)) == {"model_id": run, "path": path}
        assert await state(client, run, 5) == ("create", "a", "load")


@virtual
async def test_an_unload_does_not_wait_for_the_snapshot_of_a_load():
    """Where the disk is full it is what makes room."""
    store, group = Store(snapshot_every_s=1e9), SlowDisk()
    async with store.opened(group) as plane:
        client, run, path = await saved(plane)
        group.is_stuck = True
        load = await client.submit(run, 4, LoadCommand(path, False))
        unload = await client.submit(run, 5, UnloadCommand())
        assert await client.result(unload) == {"model_id": run}
        assert await client.result(load) == {"model_id": run, "path": path}
        assert store.journal.rows[run].snapshots == []
        group.is_stuck = False
        await asyncio.sleep(10)
        assert group.slots == [None, None]
        assert not store.files
    async with store.opened(EchoGroup()) as plane:
        client = again(client, plane)
        assert await client.result(load) == {"model_id": run, "path": path}
        assert await client.result(unload) == {"model_id": run}


@virtual
async def test_a_load_in_front_of_an_unload_is_told_when_the_group_dies_meanwhile():
    store, group = Store(snapshot_every_s=1e9), SlowDisk()
    async with store.opened(group) as plane:
        client, run, path = await saved(plane)
        other = await client.create(1)
        retire = store.journal.retire

        def retire_late(*arguments: Any) -> Any:
            store.journal._ready_at = asyncio.get_running_loop().time() + 5
            return retire(*arguments)

        store.journal.retire = retire_late
        group.is_stuck = True
        load = await client.submit(run, 4, LoadCommand(path, False))
        await client.do(run, 5, UnloadCommand())
        dies_at_next_pass(group)
        await client.do(other, 1, pass_command("c"))
        assert group.rebuilds == 1
        assert await client.result(load) == {"model_id": run, "path": path}


@pytest.mark.parametrize("restarts", [False, True])
@pytest.mark.parametrize("change", ["replace", "delete"])
@virtual
async def test_what_was_loaded_does_not_depend_on_what_becomes_of_the_checkpoint(change, restarts):
    store, group = Store(snapshot_every_s=1e9), EchoGroup()
    async with store.opened(group) as plane:
        client, run, path = await saved(plane)
        await client.do(run, 4, LoadCommand(path, False))
        await client.do(run, 5, pass_command("c"))
        if change == "replace":
            await client.do(run, 6, SaveCommand("weights", "one", overwrite=True))
        else:
            await plane.delete_checkpoint(TENANT, path)
            await client.do(run, 6, pass_command("x", backward=False))
        if not restarts:
            dies_at_next_pass(group)
            assert await state(client, run, 7) == ("create", "a", "load", "c")
            assert group.rebuilds == 1
    if restarts:
        async with store.opened(EchoGroup()) as plane:
            assert await state(again(client, plane), run, 7) == ("create", "a", "load", "c")


@pytest.mark.parametrize("restarts", [False, True])
@virtual
async def test_a_load_that_failed_is_not_done_when_its_checkpoint_is_there(restarts):
    store, group = Store(snapshot_every_s=1e9), SlowDisk()
    async with store.opened(group) as plane:
        client, run, path = await saved(plane)
        group.is_stuck = True  # or a snapshot would have all of it
        failed = await client.submit(run, 4, LoadCommand(path.replace("one", "two"), False))
        assert "does not exist" in (await client.failure(failed)).message
        await client.do(run, 5, SaveCommand("weights", "two"))
        assert await state(client, run, 6) == ("create", "a", "b")
        if not restarts:
            dies_at_next_pass(group)
            assert await state(client, run, 7) == ("create", "a", "b")
            assert group.rebuilds == 1
    if restarts:
        async with store.opened(EchoGroup()) as plane:
            client = again(client, plane)
            assert await state(client, run, 7) == ("create", "a", "b")
            assert "does not exist" in (await client.failure(failed)).message


@virtual
async def test_a_deleted_checkpoint_does_not_come_back_with_a_restart():
    store = Store(snapshot_every_s=1e9)
    async with store.opened() as plane:
        client = await Client(plane).open()
        run = await client.create()
        save = await client.submit(run, 1, SaveCommand("weights", "one"))
        answer = await client.result(save)
        await plane.delete_checkpoint(TENANT, answer["path"])
    async with store.opened(EchoGroup()) as plane:
        client = again(client, plane)
        await client.do(run, 2, pass_command("a"))
        assert await client.result(save) == answer
        assert (await plane.list_checkpoints(TENANT, run, None, 0))[1] == 0


@virtual
async def test_a_run_whose_birth_fails_when_it_is_done_again_has_no_adapter():
    """It was done and not yet told, the checkpoint was deleted, and the group died."""
    store, group = Store(snapshot_every_s=1e9), SlowDisk()
    async with store.opened(group) as plane:
        client, other, path = await saved(plane)
        group.is_stuck = True
        birth = await plane.create_model_from(TENANT, client.session, 1, path, False, None, {})
        run = f"{client.session}:train:1"
        await asyncio.sleep(1)
        assert plane._books.runs.find(run).down is None
        await plane.delete_checkpoint(TENANT, path)
        dies_at_next_pass(group)
        await client.do(other, 4, pass_command("c"))
        assert "does not exist" in (await client.failure(birth)).message
        refused = await client.failure(await client.submit(run, 1, pass_command("d")))
        assert "no adapter" in refused.message


@virtual
async def test_a_birth_that_failed_is_told_in_the_same_words_after_a_restart():
    store, group = Store(snapshot_every_s=1e9), EchoGroup()
    async with store.opened(group) as plane:
        client, other, path = await saved(plane)
        group.stored.pop(f"/nowhere/{other}/weights/one")
        birth = await plane.create_model_from(TENANT, client.session, 1, path, False, None, {})
        run = f"{client.session}:train:1"
        refused = await client.submit(run, 1, pass_command("x"))
        told = [await client.failure(each) for each in (birth, refused)]
        assert "missing" in told[0].message
        assert "no adapter" in told[1].message
    async with store.opened(EchoGroup()) as plane:
        client = again(client, plane)
        assert [await client.failure(each) for each in (birth, refused)] == told
        assert await client.failure(await client.submit(run, 2, pass_command("y"))) == told[1]


@virtual
async def test_a_load_into_a_run_without_an_adapter_is_done_again():
    """Its birth had failed, so that recovery once took it for one that nobody waits for."""
    store, group = Store(snapshot_every_s=1e9), EchoGroup()
    async with store.opened(group) as plane:
        client, other, path = await saved(plane)
        good = group.stored.pop(f"/nowhere/{other}/weights/one")
        birth = await plane.create_model_from(TENANT, client.session, 1, path, False, None, {})
        assert "missing" in (await client.failure(birth)).message
        run = f"{client.session}:train:1"
        group.stored[f"/nowhere/{other}/weights/one"] = good
        left = [1]
        group.crash_when = lambda tick, phase: bool(tick.loads and left and left.pop())
        await client.do(run, 1, LoadCommand(path, False))
        assert group.rebuilds == 1
        assert await state(client, run, 2) == ("create", "a", "load")


@virtual
async def test_a_request_without_a_number_waits_for_those_that_are_on_their_way():
    async with Store().opened() as plane:
        client = await Client(plane).open()
        run = await client.create()
        await client.submit(run, 2, pass_command("b"))
        with pytest.raises(BackendUnavailable, match="seq_id 1 has not arrived"):
            await client.submit(run, None, pass_command("c"))
        await client.submit(run, 1, pass_command("a"))
        assert await client.do(run, None, pass_command("c")) == ("create", "a", "b", "c")


@virtual
async def test_the_oldest_change_is_not_one_of_a_run_without_an_adapter():
    store, group = Store(snapshot_every_s=10), EchoGroup()
    async with store.opened(group) as plane:
        client, _, path = await saved(plane)
        group.stored.clear()
        birth = await plane.create_model_from(TENANT, client.session, 1, path, False, None, {})
        await client.failure(birth)
        await client.failure(await client.submit(f"{client.session}:train:1", 1, pass_command("z")))
        await asyncio.sleep(100)
        assert plane._keeper.oldest_change("base") is None
