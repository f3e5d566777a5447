"""What is kept and what is not: restarts, full disks, damage, silence."""

from __future__ import annotations

import asyncio
import random
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import pytest

from tests.control.echo_group import EchoGroup, pass_command
from tests.control.memory_catalog import MemoryCatalog
from tests.control.memory_journal import MemoryFiles, MemoryJournal
from tests.control.plane import TENANT, Client, counting_tokens, make_config, optim
from tests.control.virtual_time import VirtualClock, virtual
from twinkle_serve.control import recovery
from twinkle_serve.control.backend import SaveCommand, SnapshotCommand, UnloadCommand
from twinkle_serve.control.durability import Durability
from twinkle_serve.control.polling import HELD
from twinkle_serve.control.service import ControlPlane
from twinkle_serve.protocol.errors import BackendUnavailable, Busy
from twinkle_serve.protocol.work import Outcome, Tick


class Store:
    """What survives a control plane."""

    def __init__(self, limits: dict[str, Any] | None = None, **storage: Any) -> None:
        self.catalog = MemoryCatalog()
        self.journal = MemoryJournal(random.Random(3))
        self.files: dict[str, Any] = {}
        self.stored: dict[str, Any] = {}
        self.token = counting_tokens()
        self.state_files = MemoryFiles(self.files)
        self.fenced = 0
        config = make_config()
        self.config = config.model_copy(
            update={
                "storage": config.storage.model_copy(update=storage),
                "limits": config.limits.model_copy(update=limits or {}),
            }
        )

    @asynccontextmanager
    async def opened(self, group: EchoGroup | None = None):
        group = group or EchoGroup()
        group.files, group.stored = self.files, self.stored
        self.journal = self.journal.opened()
        durability = Durability(self.journal, self.state_files, fenced=self._note_fenced)
        plane = ControlPlane(
            {"base": group},
            self.catalog,  # type: ignore[arg-type]
            self.config,
            VirtualClock(),
            new_token=self.token,
            durability=durability,
        )
        await plane.start()
        try:
            yield plane
        finally:
            await plane.close()

    def _note_fenced(self) -> None:
        self.fenced += 1


def again(client: Client, plane: ControlPlane) -> Client:
    other = Client(plane, client.tenant)
    other.session = client.session
    return other


@virtual
async def test_after_a_restart_results_are_there_again_under_the_same_ids():
    store = Store(snapshot_every_steps=1)
    async with store.opened() as plane:
        client = await Client(plane).open()
        run = await client.create()
        requests = [await client.submit(run, 1, pass_command("a")), await client.submit(run, 2, optim())]
        await client.result(requests[1])
        await asyncio.sleep(5)
        requests.append(await client.submit(run, 3, pass_command("b")))
    assert len(store.journal.rows[run].snapshots) == 1
    async with store.opened() as plane:
        client = again(client, plane)
        assert await client.result(requests[0]) == ["create", "a"]
        assert await client.result(requests[2]) == ("create", "a", "optim 1", "b")
        assert await client.submit(run, 1, pass_command("a")) == requests[0]
        assert await client.submit(run, 3, pass_command("b")) == requests[2]
        assert await client.do(run, 4, pass_command("c")) == ("create", "a", "optim 1", "b", "c")


@virtual
async def test_snapshots_go_on_after_a_restart_without_the_results_that_an_old_one_covers():
    """Between two snapshots the journal keeps what was done, but results only for their time."""
    store = Store(snapshot_every_steps=1)
    async with store.opened() as plane:
        client = await Client(plane).open()
        run = await client.create()
        requests = []
        for seq_id in (1, 3):
            requests.append(await client.submit(run, seq_id, pass_command(f"p{seq_id}")))
            requests.append(await client.submit(run, seq_id + 1, optim()))
            await client.result(requests[-1])
            await asyncio.sleep(5)
        history = store.journal.rows[run]
        assert [snapshot.covered for snapshot in history.snapshots] == [4, 2]
        await store.journal.drop_results(requests)
    async with store.opened() as plane:
        client = again(client, plane)
        assert (await plane.poll(TENANT, requests[2], 0.0)).state == "gone"
        await client.do(run, 5, optim())
        await asyncio.sleep(5)
        assert [snapshot.covered for snapshot in store.journal.rows[run].snapshots] == [5, 4]
        assert plane._books.promises.num_pending == 0


@virtual
async def test_a_stop_leaves_open_promises_open():
    store = Store()
    async with store.opened(EchoGroup(pass_s=3600)) as plane:
        client = await Client(plane).open()
        run = await client.create()
        request = await client.submit(run, 1, pass_command("slow"))
        poll = asyncio.create_task(plane.poll(TENANT, request, 600.0))
        await asyncio.sleep(1)
    assert (await poll).state == "pending"
    async with store.opened() as plane:
        assert await again(client, plane).result(request) == ("create", "slow")


@virtual
async def test_a_run_that_cannot_be_restored_now_waits_and_loses_nothing():
    """As with a disk that is away, or a max_rank that was lowered."""
    store = Store(snapshot_every_steps=1)
    async with store.opened() as plane:
        client = await Client(plane).open()
        run = await client.create()
        for seq_id in (1, 3):
            await client.do(run, seq_id, pass_command(f"p{seq_id}"))
            await client.do(run, seq_id + 1, optim())
            await asyncio.sleep(5)
        await client.do(run, 5, pass_command("p5"))
    snapshots = store.journal.rows[run].snapshots
    assert [snapshot.covered for snapshot in snapshots] == [4, 2]
    group = EchoGroup()
    group.num_unwilling = 3
    async with store.opened(group) as plane:
        client = again(client, plane)
        other = await client.create(1)
        waiting = await client.submit(run, 6, pass_command("p6"))
        await asyncio.sleep(60)
        assert group.num_unwilling == 1
        poll = await plane.poll(TENANT, waiting, 0.0)
        assert (poll.state, poll.queue_state, poll.queue_reason) == ("pending", "paused_capacity", HELD)
        await client.do(other, 1, pass_command("a"))
        assert store.journal.rows[run].snapshots == snapshots
    group = EchoGroup()  # a stop waits for no retry, and the next life begins with a try
    async with store.opened(group) as plane:
        expected = ("create", "p1", "optim 1", "p3", "optim 1", "p5", "p6")
        assert await again(client, plane).result(waiting) == expected
        assert not plane._books.runs.get(TENANT, run).record.corrupted


@virtual
async def test_a_run_that_could_not_be_restored_is_tried_again():
    store = Store(snapshot_every_steps=1)
    async with store.opened() as plane:
        client = await Client(plane).open()
        run = await client.create()
        await client.do(run, 1, optim())
        await asyncio.sleep(5)
    group = EchoGroup()
    group.num_unwilling = 9
    async with store.opened(group) as plane:
        client = again(client, plane)
        assert await client.do(run, 2, pass_command("a")) == ("create", "optim 1", "a")
        tries = [tick.tick_id for tick in group.ticks if tick.restores]
        assert len(tries) == 10
        waited = asyncio.get_running_loop().time()
        assert waited > 30 * (2**7 - 1) + 2 * 3600  # less and less often, but each hour
        assert await client.do(run, 3, pass_command("b")) == ("create", "optim 1", "a", "b")


@virtual
async def test_a_pass_that_failed_by_accident_does_not_succeed_when_it_is_done_again():
    """Its client may have sent it once more: the gradient would count twice."""
    store = Store()
    unlucky = EchoGroup()
    unlucky.fails = lambda tag: tag == "b"
    async with store.opened(unlucky) as plane:
        client = await Client(plane).open()
        run = await client.create()
        await client.do(run, 1, pass_command("a"))
        failure = await client.failure(await client.submit(run, 2, pass_command("b")))
        unlucky.fails = lambda tag: False
        unlucky.crash_when = lambda tick, phase: unlucky.rebuilds == 0
        assert await client.do(run, 3, pass_command("c")) == ("create", "a", "c")
        assert unlucky.rebuilds == 1
    async with store.opened() as plane:
        client = again(client, plane)
        assert await client.do(run, 4, pass_command("d")) == ("create", "a", "c", "d")
        assert await client.failure(await client.submit(run, 2, pass_command("b"))) == failure


@virtual
async def test_a_second_coordinator_fences_the_first():
    store = Store()
    async with store.opened() as old:
        client = await Client(old).open()
        run = await client.create()
        async with store.opened() as new:
            with pytest.raises(BackendUnavailable, match="taken over"):
                await client.submit(run, 1, pass_command("lost"))
            assert store.fenced == 1
            assert await again(client, new).do(run, 1, pass_command("a")) == ("create", "a")


@virtual
async def test_an_old_coordinator_that_wakes_up_saves_nothing():
    store = Store()
    group = EchoGroup()
    async with store.opened(group) as old:
        client = await Client(old).open()
        run = await client.create()
        group.pass_s = 50.0
        await client.submit(run, 1, pass_command("slow"))
        await client.submit(run, 2, SaveCommand("weights", "latest", overwrite=True))
        await asyncio.sleep(1)
        async with store.opened() as new:
            resumed = again(client, new)
            saved = await resumed.submit(run, 2, SaveCommand("weights", "latest", overwrite=True))
            await resumed.result(saved)
            await resumed.do(run, 3, pass_command("more"))
            await resumed.do(run, 4, SaveCommand("weights", "latest", overwrite=True))
            newest = dict(store.stored)
            await asyncio.sleep(60)
            assert not any(tick.saves for tick in group.ticks)
            assert store.stored == newest
            assert store.fenced, "the tick and the sweep both say so"


@virtual
async def test_with_a_full_disk_training_waits_and_goes_on():
    store = Store()
    async with store.opened() as plane:
        client = await Client(plane).open()
        run = await client.create()
        store.journal.stalled = "disk full"
        with pytest.raises(BackendUnavailable, match="disk full"):
            await client.submit(run, 1, pass_command("a"))
        store.journal.stalled = None
        assert await client.do(run, 1, pass_command("a")) == ("create", "a")


@virtual
async def test_a_client_cannot_send_ahead_without_end():
    store = Store()
    store.config.limits.parked_bytes_per_run = 2**20
    async with store.opened() as plane:
        client = await Client(plane).open()
        run = await client.create()
        for seq_id in (2, 3):
            await client.submit(run, seq_id, pass_command("x" * 2**19))
        with pytest.raises(BackendUnavailable, match="waits for seq_id 1"):
            await client.submit(run, 4, pass_command("y"))
        await client.submit(run, 1, pass_command("a"))
        assert len(await client.do(run, 4, pass_command("y"))) == 5


@virtual
async def test_a_full_journal_makes_room_for_itself():
    store = Store(snapshot_every_s=1e9, snapshot_every_steps=10**6)
    async with store.opened() as plane:
        client = await Client(plane).open()
        run = await client.create()
        await client.do(run, 1, pass_command("a"))
        store.journal.num_bytes = store.config.storage.journal_max_bytes + 1
        with pytest.raises(BackendUnavailable, match="journal is full"):
            await client.submit(run, 2, pass_command("b"))
        await asyncio.sleep(10)
        assert [s.covered for s in store.journal.rows[run].snapshots] == [1]


@virtual
async def test_a_silent_session_frees_its_slots_and_comes_back():
    store = Store(snapshot_every_s=1e9)
    group = EchoGroup()
    async with store.opened(group) as plane:
        client = await Client(plane).open()
        run = await client.create()
        await client.do(run, 1, pass_command("a"))
        await asyncio.sleep(620)
        assert group.slots == [None, None]
        assert await plane.heartbeat(TENANT, client.session)
        assert await client.do(run, 2, pass_command("b")) == ("create", "a", "b")


@virtual
async def test_a_run_that_nobody_trained_is_written_only_when_it_has_to_go():
    store = Store(snapshot_every_s=1.0)
    async with store.opened() as plane:
        client = await Client(plane).open()
        run = await client.create()
        await asyncio.sleep(10)
        assert not store.journal.rows[run].snapshots
    group = EchoGroup()
    async with store.opened(group) as plane:
        client = again(client, plane)
        assert await client.do(run, 1, pass_command("a")) == ("create", "a")
        idle = await (await Client(plane).open()).create()
        await asyncio.sleep(620)  # nobody has sent a heartbeat
        assert store.journal.rows[idle].snapshots
        assert group.slots == [None, None]


@virtual
async def test_an_unloaded_run_leaves_its_results_and_nothing_else():
    store = Store(snapshot_every_steps=1)
    async with store.opened() as plane:
        client = await Client(plane).open()
        run = await client.create()
        await client.do(run, 1, optim())
        await asyncio.sleep(5)
        assert store.files
        step = await client.submit(run, 2, pass_command("a"))
        bye = await client.submit(run, 3, UnloadCommand())
        await client.result(bye)
        await asyncio.sleep(5)
        assert store.journal.rows[run].entries == []
        assert not store.files
    async with store.opened() as plane:
        client = again(client, plane)
        assert await client.result(bye) == {"model_id": run}
        assert await client.result(step) == ["create", "optim 1", "a"]


@virtual
async def test_what_an_unloaded_run_was_doing_when_its_group_died_is_told():
    """It is not done again: whoever waits would wait for ever, and the run would never be retired."""
    store, group = Store(), EchoGroup()
    async with store.opened(group) as plane:
        client = await Client(plane).open()
        record = await client.create()
        group.pass_s = 10**6  # longer than it will live
        doing = await client.submit(record, 1, pass_command("a"))
        await asyncio.sleep(1)
        run = plane._books.runs.find(record)
        run.record = replace(run.record, unloaded=True)
        await recovery.rewind(plane._keeper, run)
        assert "unloaded meanwhile" in (await client.failure(doing)).message


class SlowDisk(EchoGroup):
    """Snapshots are whole some ticks after they were ordered."""

    ticks_to_wait = 0

    def _write(self, tick: Tick) -> list[Outcome]:
        if self.writing and self.ticks_to_wait:
            self.ticks_to_wait -= 1
            return []
        return super()._write(tick)


@virtual
async def test_a_snapshot_that_is_whole_only_after_an_unload_does_not_bring_the_run_back():
    store = Store(snapshot_every_steps=1)
    group = SlowDisk()
    group.ticks_to_wait = 50
    async with store.opened(group) as plane:
        client = await Client(plane).open()
        run = await client.create()
        await client.do(run, 1, optim())
        assert group.writing
        assert await client.do(run, 2, UnloadCommand()) == {"model_id": run}
        await asyncio.sleep(5)
        assert not group.writing
        assert not store.files
    async with store.opened() as plane:
        assert (store.journal.rows[run].snapshots, plane._books.runs.find(run).record.unloaded) == ([], True)


@virtual
async def test_an_unloaded_run_is_retired_however_long_its_last_save_takes():
    store = Store(snapshot_every_s=1e9)
    group = EchoGroup()
    group.delay_saves = 10**9
    async with store.opened(group) as plane:
        client = await Client(plane).open()
        run = await client.create()
        await client.submit(run, 1, SaveCommand("weights", "slow"))
        await client.do(run, 2, UnloadCommand())
        await asyncio.sleep(60)
        assert store.journal.rows[run].entries
        group.late_saves = [(0, outcome) for _, outcome in group.late_saves]
        await asyncio.sleep(5)
        assert not store.journal.rows[run].entries


@virtual
async def test_a_snapshot_for_sampling_survives_a_restart():
    store = Store(snapshot_every_steps=1)
    async with store.opened() as plane:
        client = await Client(plane).open()
        run = await client.create()
        await client.do(run, 1, optim())
        sampler = (await client.do(run, 2, SnapshotCommand(7)))["sampling_session_id"]
        await client.do(run, 3, optim(2.0))
        await asyncio.sleep(5)
    async with store.opened() as plane:
        assert await again(client, plane).result(await again(client, plane).sample(sampler)) == (
            "create",
            "optim 1",
        )


@virtual
async def test_a_checkpoint_deleted_after_its_answer_stays_deleted():
    store = Store(snapshot_every_s=1e9)
    group = EchoGroup()
    async with store.opened(group) as plane:
        client = await Client(plane).open()
        run = await client.create()
        path = (await client.do(run, 1, SaveCommand("weights", "gone")))["path"]
        kept = (await client.do(run, 2, SaveCommand("weights", "kept")))["path"]
        await plane.delete_checkpoint(TENANT, path)
        group.crash_when = lambda tick, phase: True
        await client.submit(run, 3, pass_command("a"))
        await asyncio.sleep(1)
        group.crash_when = lambda tick, phase: False
        assert await client.do(run, 4, pass_command("b")) == ("create", "a", "b")
        listed, _ = await plane.list_checkpoints(TENANT, run, None, 0)
        assert [checkpoint["tinker_path"] for checkpoint in listed] == [kept]


@virtual
async def test_a_dead_group_never_has_long_to_redo():
    """Steps of a second each: a snapshot every ten, though neither steps nor time ask for one."""
    store = Store(snapshot_every_steps=10_000, snapshot_every_s=10_000.0, snapshot_replay_s=10.0)
    async with store.opened(EchoGroup(pass_s=1.0)) as plane:
        client = await Client(plane).open()
        run_id = await client.create()
        assert plane._keeper is not None
        kept = plane._keeper.kept[run_id]
        longest = 0.0
        for seq_id in range(1, 61):
            await client.do(run_id, seq_id, pass_command(f"p{seq_id}"))
            longest = max(longest, kept.debt_s)
            assert len(kept.to_redo) <= 14, "the work since the last snapshot, and while that was listed"
        assert longest >= 9.0
        assert kept.covered >= 40


@virtual
async def test_a_full_disk_stops_saves_and_not_training():
    store = Store(disk_reserve_bytes=2**30)
    async with store.opened() as plane:
        client = await Client(plane).open()
        run_id = await client.create()
        store.state_files.free = 2**30 - 1
        failure = await client.failure(await client.submit(run_id, 1, SaveCommand("weights", "a")))
        assert (failure.category, "disk is full" in failure.message) == ("server", True)
        assert "storage.disk_reserve_bytes is 1073741824" in failure.message
        assert await client.do(run_id, 2, pass_command("p2")) == ("create", "p2")
        assert (await plane.list_checkpoints(TENANT, run_id, None, 0))[1] == 0
        store.state_files.free = 2**30
        assert "path" in await client.do(run_id, 3, SaveCommand("weights", "a"))


@virtual
async def test_checkpoints_of_all_tenants_have_a_limit():
    store = Store(checkpoints_max_bytes=150)
    async with store.opened() as plane:
        one, other = await Client(plane).open(), await Client(plane, "bob").open()
        mine, his = await one.create(), await other.create()
        path = (await one.do(mine, 1, SaveCommand("weights", "a")))["path"]
        await other.do(his, 1, SaveCommand("weights", "a"))
        failure = await other.failure(await other.submit(his, 2, SaveCommand("weights", "b")))
        assert "storage.checkpoints_max_bytes is 150" in failure.message
        await plane.delete_checkpoint(TENANT, path)
        assert "path" in await other.do(his, 3, SaveCommand("weights", "b"))


@virtual
async def test_results_that_were_fetched_make_room_for_others_and_stay_gone():
    store = Store(limits={"results_max_bytes": 100_000})
    group = EchoGroup()
    group.bytes_per_result = 40_000
    async with store.opened(group) as plane:
        client = await Client(plane).open()
        run_id = await client.create()
        requests = [await client.submit(run_id, n, pass_command(f"p{n}")) for n in (1, 2, 3)]
        await asyncio.sleep(1)
        with pytest.raises(Busy, match="room for results is full"):
            await client.submit(run_id, 4, pass_command("p4"))
        await client.result(requests[1])
        await asyncio.sleep(10)
        states = [(await plane.poll(TENANT, request, 0)).state for request in requests]
        assert states == ["done", "gone", "done"], "the only one that was fetched"
        assert await client.do(run_id, 4, pass_command("p4")) == ("create", "p1", "p2", "p3", "p4")
        await asyncio.sleep(120)  # a snapshot keeps what is left
    async with store.opened() as plane:
        states = [(await plane.poll(TENANT, request, 0)).state for request in requests]
        assert states[1] == "gone"


@virtual
async def test_a_laptop_that_slept_through_a_restart_goes_on():
    store = Store(snapshot_every_s=1e9)
    async with store.opened() as plane:
        client = await Client(plane).open()
        run = await client.create()
        await client.do(run, 1, pass_command("a"))
        await asyncio.sleep(620)
        assert store.journal.rows[run].snapshots[0].covered == 1
    async with store.opened(EchoGroup()) as plane:
        await asyncio.sleep(3600)
        assert await plane.heartbeat(TENANT, client.session)
        assert await again(client, plane).do(run, 2, pass_command("b")) == ("create", "a", "b")
