"""A journal above its limit, on a real disk: it becomes smaller again, and nothing is lost by that."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.control.echo_group import EchoGroup, pass_command
from tests.control.plane import TENANT, Client, optim
from tests.control.test_keeper import Store, again
from twinkle_serve.control import room
from twinkle_serve.control.backend import LoadCommand, SaveCommand, UnloadCommand
from twinkle_serve.control.service import ControlPlane
from twinkle_serve.protocol.errors import BackendUnavailable
from twinkle_serve.protocol.work import Failure
from twinkle_serve.storage.journal import Journal

LIMIT = 2**20
BIG = "x" * 400_000


class DiskJournal(Journal):
    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self._root = root

    def opened(self) -> DiskJournal:
        self.close()
        return DiskJournal(self._root)


class DiskStore(Store):
    def __init__(self, root: Path, **storage: Any) -> None:
        super().__init__(**storage)
        self.journal = DiskJournal(root)  # type: ignore[assignment]

    @asynccontextmanager
    async def opened(self, group: EchoGroup | None = None) -> AsyncIterator[ControlPlane]:
        async with super().opened(group) as plane, asyncio.timeout(60):
            yield plane
        self.journal.close()  # type: ignore[attr-defined]


def limited(root: Path, limit: int = LIMIT) -> DiskStore:
    """Runs are snapshotted only when room is needed."""
    store = DiskStore(root, snapshot_every_s=1e9, snapshot_every_steps=10**6, snapshot_replay_s=1e9)
    store.config.storage.journal_max_bytes = limit
    return store


async def submit(client: Client, run: str, seq_id: int, command: Any) -> str:
    """As the SDK does it: again and again while there is no room."""
    while True:
        try:
            return await client.submit(run, seq_id, command)
        except BackendUnavailable:
            client.plane._drivers["base"].wake()  # what the sweep does every few seconds
            await asyncio.sleep(0.02)


async def fill(client: Client, run: str, first: int = 1) -> list[str]:
    """Passes with the numbers from ``first`` until no more goes in."""
    requests = []
    while client.plane._keeper.journal.num_bytes <= LIMIT:
        requests.append(await client.submit(run, first + len(requests), pass_command(BIG)))
    with pytest.raises(BackendUnavailable, match="journal is full"):
        await client.submit(run, first + len(requests), pass_command(BIG))
    return requests


async def test_a_first_snapshot_makes_room(tmp_path):
    store = limited(tmp_path)
    async with store.opened() as plane:
        client = await Client(plane).open()
        run = await client.create()
        requests = await fill(client, run)
        await submit(client, run, len(requests) + 1, pass_command("end"))
        assert store.journal.num_bytes < LIMIT / 2
    async with store.opened() as plane:
        client = again(client, plane)
        assert len(await client.result(requests[0])) == 2, "its result was kept"
        assert len(await client.do(run, len(requests) + 2, pass_command("more"))) == len(requests) + 3


async def test_a_run_with_two_snapshots_is_left_with_one(tmp_path):
    store = limited(tmp_path)
    async with store.opened() as plane:
        client = await Client(plane).open()
        run = await client.create()
        store.config.storage.snapshot_every_steps = 1
        seq_id = 0
        for _ in range(2):
            await client.do(run, seq_id + 1, pass_command("p"))
            await client.do(run, seq_id + 2, optim())
            seq_id += 2
            while plane._keeper.kept[run].covered < seq_id:
                await asyncio.sleep(0.02)
        assert len(store.files) == 2
        store.config.storage.snapshot_every_steps = 10**6
        seq_id += len(await fill(client, run, seq_id + 1))
        await submit(client, run, seq_id + 1, pass_command("end"))
        assert (len(store.files), len(plane._keeper.kept[run].snapshots)) == (1, 1)
        assert len(await client.do(run, seq_id + 2, pass_command("more"))) == seq_id + 3


@pytest.mark.parametrize("restarted", [False, True])
async def test_runs_that_nothing_was_done_to_since_make_room(tmp_path, restarted):
    store = limited(tmp_path)
    async with store.opened() as plane:
        client = await Client(plane).open()
        clean, waiting = [await client.create(n) for n in (0, 1)]
        await client.do(clean, 1, pass_command(BIG))
        kept = plane._keeper.kept[clean]
        kept.is_urgent = True
        plane._drivers["base"].wake()
        while kept.covered < 1:
            await asyncio.sleep(0.02)
        if not restarted:
            await client.submit(waiting, 2, pass_command(BIG))
            await client.submit(waiting, 3, pass_command(BIG))
            await submit(client, waiting, 1, pass_command("first"))
            assert len(await client.result(await submit(client, clean, 2, pass_command("b")))) == 3
    if restarted:
        store.config.storage.journal_max_bytes = 300_000
        async with store.opened(EchoGroup()) as plane:
            client = again(client, plane)
            assert store.journal.num_bytes > 300_000
            assert len(await client.result(await submit(client, clean, 2, pass_command("b")))) == 3


async def test_an_unload_is_let_through(tmp_path):
    store = limited(tmp_path)
    async with store.opened() as plane:
        client = await Client(plane).open()
        run, waiting = [await client.create(n) for n in (0, 1)]
        await fill(client, waiting, first=2)  # the first never comes
        assert await client.do(run, 1, UnloadCommand()) == {"model_id": run}


async def test_what_a_run_without_an_adapter_was_asked_is_not_kept_for_ever(tmp_path):
    store = limited(tmp_path)
    group = EchoGroup()
    async with store.opened(group) as plane:
        client = await Client(plane).open()
        other = await client.create()
        good, bad = [
            (await client.do(other, n, SaveCommand("weights", name)))["path"]
            for n, name in ((1, "good"), (2, "bad"))
        ]
        group.stored.pop(next(path for path in group.stored if path.endswith("bad")))
        request = await plane.create_model_from(TENANT, client.session, 1, bad, False, None, {})
        run = (await client.failure(request)) and f"{client.session}:train:1"
        requests = await fill(client, run)
        failure = await client.failure(requests[0])
        assert "no adapter" in failure.message
        seq_id = len(requests) + 1
        end = await submit(client, run, seq_id, pass_command("end"))
        assert (await client.failure(end)).message == failure.message
        assert store.journal.num_bytes < LIMIT / 2
        # It is as good as any that lost its adapter: with a checkpoint it goes on.
        await client.do(run, seq_id + 1, LoadCommand(good, False))
        assert await client.do(run, seq_id + 2, pass_command("a")) == ("create", "load", "a")
    async with store.opened(EchoGroup()) as plane:
        client = again(client, plane)
        assert (await client.failure(requests[0])).message == failure.message
        assert (await client.failure(request)).message
        assert await client.do(run, seq_id + 3, pass_command("b")) == ("create", "load", "a", "b")


async def test_refusals_that_need_no_tick_are_over_and_can_be_forgotten(tmp_path):
    """Nothing else has anything to do in the group, so no tick comes after them."""
    store = limited(tmp_path)
    group = EchoGroup()
    async with store.opened(group) as plane:
        client = await Client(plane).open()
        other = await client.create()
        path = (await client.do(other, 1, SaveCommand("weights", "bad")))["path"]
        kept = plane._keeper.kept[other]
        kept.is_urgent = True
        plane._drivers["base"].wake()
        while kept.covered < 1:
            await asyncio.sleep(0.02)
        group.stored.clear()
        await client.failure(await plane.create_model_from(TENANT, client.session, 1, path, False, None, {}))
        for request in await fill(client, f"{client.session}:train:1"):
            await client.failure(request)
        assert await client.result(await submit(client, other, 2, pass_command("a"))) == ("create", "a")


async def test_what_could_not_be_written_is_never_acknowledged(tmp_path):
    store = limited(tmp_path)
    async with store.opened() as plane:
        client = await Client(plane).open()
        run, other = [await client.create(n) for n in (0, 1)]
        for _ in range(2):
            with pytest.raises(BackendUnavailable, match="cannot hold this request"):
                await client.submit(run, 2**63, pass_command("a"))
            assert len(await client.do(other, None, pass_command("b"))) > 1


async def test_requests_that_failed_behind_a_gap_are_not_kept_for_ever(tmp_path):
    store = limited(tmp_path)
    async with store.opened() as plane:
        client = await Client(plane).open()
        run = await client.create()
        plane._books.runs.find(run).log._gap_timeout_s = 0.5
        requests = await fill(client, run, first=2)
        assert "did not arrive" in (await client.failure(requests[-1])).message
        last = len(requests) + 1
        assert await client.result(await submit(client, run, last + 1, pass_command("a"))) == ("create", "a")
        assert store.journal.num_bytes < LIMIT / 2
    async with store.opened(EchoGroup()) as plane:
        client = again(client, plane)
        assert "did not arrive" in (await client.failure(requests[0])).message
        assert await client.do(run, last + 2, pass_command("b")) == ("create", "a", "b")


@pytest.mark.parametrize("state", ["", "rewinding", "in the tick", "corrupted"])
async def test_a_run_that_may_come_back_is_not_forgotten(tmp_path, state):
    store = limited(tmp_path)
    async with store.opened() as plane:
        client = await Client(plane).open()
        run_id = await client.create()
        keeper, run = plane._keeper, plane._books.runs.find(run_id)
        await client.do(run_id, 1, pass_command("a"))
        run.down = Failure("it has no adapter", "server")
        kept = keeper.kept[run_id]
        kept.is_rewinding = state == "rewinding"
        keeper._work[run.group][run_id] = int(state == "in the tick")
        run.record = replace(run.record, corrupted=state == "corrupted")
        assert room._is_of_no_use(keeper, kept) == (state == "")
