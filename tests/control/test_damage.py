"""What is damaged in the journal is not guessed at: its run is marked, who waits is told, others go on."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest

from tests.control.echo_group import EchoGroup, pass_command
from tests.control.plane import TENANT, Client, optim
from tests.control.test_keeper import Store, again
from tests.control.virtual_time import virtual
from twinkle_serve.storage.journal_rows import DamagedEntry


class Damaged(Store):
    """A store in which two runs did two passes each; ``strike`` makes a row of the first unreadable."""

    async def fill(self) -> None:
        async with self.opened() as plane:
            self.client = await Client(plane).open()
            self.runs = [await self.client.create(n) for n in (0, 1)]
            self.requests = {}
            for run in self.runs:
                for seq_id in (1, 2):
                    self.requests[run, seq_id] = await self.client.submit(
                        run, seq_id, pass_command(f"p{seq_id}")
                    )
                    await self.client.result(self.requests[run, seq_id])

    def strike(self, number: int, run_id: str | None = None, **says) -> None:
        """The row of that number is damaged; in it stands now what ``says`` says, below that run."""
        history = self.journal.rows[self.runs[0]]
        index = next(n for n, entry in enumerate(history.entries) if entry.seq_id == number)
        entry = history.entries.pop(index)
        row = DamagedEntry(entry.seq_id, entry.request_id, index)
        self.journal.rows[run_id or self.runs[0]].damaged.append(replace(row, **says))


async def is_marked(store: Damaged) -> None:
    async with store.opened(EchoGroup()) as plane:
        client = again(store.client, plane)
        assert [(await plane.get_run(TENANT, run))["corrupted"] for run in store.runs] == [True, False]
        failure = await client.failure(await client.submit(store.runs[0], 3, pass_command("p3")))
        assert "could not be recovered" in failure.message
        waiting = await client.failure(store.requests[store.runs[0], 2])
        assert "could not be recovered" in waiting.message
        assert await client.do(store.runs[1], 3, pass_command("p3")) == ("create", "p1", "p2", "p3")


@pytest.mark.parametrize("seq_id", [1, 2])
@virtual
async def test_a_damaged_row_marks_its_run_and_no_other(seq_id):
    store = Damaged()
    await store.fill()
    store.strike(seq_id)
    await is_marked(store)


@virtual
async def test_the_name_of_the_run_may_be_what_is_damaged():
    store = Damaged()
    await store.fill()
    store.strike(2, run_id=store.runs[0].replace("train", "tr\ufffdin"))
    await is_marked(store)


@virtual
async def test_a_row_that_claims_to_be_covered_may_lie():
    store = Damaged(snapshot_every_steps=1)
    await store.fill()
    history = store.journal.rows[store.runs[0]]
    assert not history.snapshots
    store.strike(2, seq_id=-7)
    await is_marked(store)


@pytest.mark.parametrize("number", [0, 1, 2])
@virtual
async def test_a_damaged_row_that_a_snapshot_covers_does_no_harm(number):
    store = Damaged()
    await store.fill()
    async with store.opened(EchoGroup()):
        await asyncio.sleep(70)
    assert store.journal.rows[store.runs[0]].snapshots[0].covered == 2
    store.strike(number)
    async with store.opened(EchoGroup()) as plane:
        assert (await plane.get_run(TENANT, store.runs[0]))["corrupted"] is False
        client = again(store.client, plane)
        assert await client.do(store.runs[0], 3, pass_command("p3")) == ("create", "p1", "p2", "p3")


@virtual
async def test_who_waits_for_a_run_that_is_lost_is_told_so_with_a_full_disk_too():
    store, group = Store(), EchoGroup()
    async with store.opened(group) as plane:
        client = await Client(plane).open()
        run_id = await client.create()
        await client.do(run_id, 1, pass_command("a"))
        await client.do(run_id, 2, optim())
        await asyncio.sleep(70)
        assert plane._keeper.kept[run_id].snapshots
        group.files.clear()
        store.journal.rows[run_id].entries.clear()
        group.is_up = False

        def full(record):
            raise OSError("database or disk is full")

        request = await client.submit(run_id, 3, pass_command("b"))
        plane._books.runs._save = full
        poll = await plane.poll(TENANT, request, 3600)
        assert poll.failure is not None
        assert "could not be recovered" in poll.failure.message
        run = plane._books.runs.find(run_id)
        assert run.record.corrupted
        assert not run.log.is_held
        assert (
            "could not be recovered"
            in (await client.failure(await client.submit(run_id, 4, pass_command("c")))).message
        )
