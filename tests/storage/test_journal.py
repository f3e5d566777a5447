"""The journal: durable before it answers, fenced, honest about damage, patient with a full disk."""

from __future__ import annotations

import asyncio
import logging
import os
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path

import pytest
import sqlalchemy as sa

from twinkle_serve.storage.journal import Fenced, Journal
from twinkle_serve.storage.journal_rows import JournalEntry, RunHistory, StoredResult, StoredSnapshot


def entry(seq_id: int, run_id: str = "run", payload: bytes | None = None) -> JournalEntry:
    return JournalEntry(run_id, seq_id, f"{run_id}-{seq_id}", payload or b"%d" % seq_id * 10, 0.0)


def result(seq_id: int, settled_at: float = 0.0) -> StoredResult:
    return StoredResult("run", seq_id, f"run-{seq_id}", b"result %d" % seq_id, settled_at)


def snapshot(covered: int) -> StoredSnapshot:
    return StoredSnapshot("run", covered, f"file-{covered}", 1, 0.0)


@asynccontextmanager
async def opened(root: Path) -> AsyncIterator[Journal]:
    journal = Journal(root)
    try:
        yield journal
    finally:
        journal.close()


async def write(root: Path, *entries: JournalEntry) -> None:
    async with opened(root) as journal:
        await asyncio.gather(*(journal.append(each) for each in entries))


async def read(root: Path) -> dict[str, RunHistory]:
    async with opened(root) as journal:
        return journal.histories()


@contextmanager
def held(journal: Journal, statement: str) -> Iterator[threading.Event]:
    """Until the end of this the writer stops before statements that begin so. The event: it has."""
    reached, go_on = threading.Event(), threading.Event()

    def stop(*arguments: object) -> None:
        if str(arguments[2]).lower().startswith(statement) and not go_on.is_set():
            reached.set()
            assert go_on.wait(20)

    sa.event.listen(journal._engine, "before_cursor_execute", stop)
    try:
        yield reached
    finally:
        go_on.set()


async def reach(event: threading.Event) -> None:
    assert await asyncio.to_thread(event.wait, 20)


async def test_entries_come_back_in_order_of_arrival(tmp_path):
    written = [entry(seq_id) for seq_id in (3, 1, 2)] + [entry(1, "other")]
    await write(tmp_path, *written)
    histories = await read(tmp_path)
    assert histories["run"].entries == written[:3]
    assert histories["other"].entries == written[3:]


async def test_appends_are_answered_in_order_and_share_transactions(tmp_path):
    async with opened(tmp_path) as journal:
        order: list[int] = []
        futures = [journal.append(entry(n)) for n in range(300)]
        for n, future in enumerate(futures):
            future.add_done_callback(lambda _, n=n: order.append(n))
        await asyncio.gather(*futures)
        assert order == list(range(300))


async def test_a_snapshot_keeps_results_and_drops_what_it_covers(tmp_path):
    async with opened(tmp_path) as journal:
        for n in range(6):
            journal.append(entry(n))
        await journal.cover(snapshot(2), [result(1), result(2)], drop_until=-1)
        await journal.cover(snapshot(4), [result(3)], drop_until=2)
        history = await journal.history("run")
        assert [each.seq_id for each in history.entries] == [3, 4, 5]
        assert [each.covered for each in history.snapshots] == [4, 2]
        assert [each.seq_id for each in history.results] == [1, 2, 3]
        assert journal.num_bytes == sum(len(each.payload) for each in history.entries)
        await journal.cover(snapshot(5), [], drop_until=4, drop_snapshots=[2])
        assert [each.covered for each in (await journal.history("run")).snapshots] == [5, 4]


async def test_results_expire_and_a_retired_run_leaves_only_its_results(tmp_path):
    async with opened(tmp_path) as journal:
        journal.append(entry(1))
        journal.cover(snapshot(1), [result(1, settled_at=10.0)], drop_until=0)
        await journal.retire("run", [result(2, settled_at=20.0)])
        history = await journal.history("run")
        assert (history.entries, history.snapshots) == ([], [])
        assert [each.seq_id for each in history.results] == [1, 2]
        await journal.expire_results(settled_before=15.0)
        assert [each.seq_id for each in (await journal.history("run")).results] == [2]


async def test_single_results_can_be_dropped(tmp_path):
    async with opened(tmp_path) as journal:
        await journal.cover(snapshot(3), [result(1), result(2), result(3)], 0)
        await journal.drop_results(["run-1", "run-3", "never"])
        assert [each.request_id for each in (await journal.history("run")).results] == ["run-2"]


async def test_what_comes_while_entries_are_dropped_is_counted(tmp_path):
    async with opened(tmp_path) as journal:
        await journal.append(entry(1))
        with held(journal, "select sum") as dropping:
            done = journal.cover(snapshot(1), [], 1)
            await reach(dropping)
            late = journal.append(entry(2))
        await asyncio.gather(done, late)
        assert journal.num_bytes == len(entry(2).payload)


async def test_an_entry_that_cannot_be_written_fails_alone(tmp_path):
    async with opened(tmp_path) as journal:
        with held(journal, "update") as writing:  # so that the others share a transaction
            first = journal.flush()
            await reach(writing)
            three = [journal.append(entry(n)) for n in (1, 2**63, 2)]
        await first
        answers = await asyncio.gather(*three, return_exceptions=True)
        assert [type(answer) for answer in answers] == [type(None), OverflowError, type(None)]
        assert [each.seq_id for each in (await journal.history("run")).entries] == [1, 2]
        assert journal.num_bytes == len(entry(1).payload) + len(entry(2).payload)


async def test_damaged_entries_count_until_they_are_dropped(tmp_path):
    marker = os.urandom(40)
    await write(tmp_path, entry(1, payload=marker), entry(2), entry(3))
    _flip(tmp_path / "journal.sqlite", marker)
    async with opened(tmp_path) as journal:
        assert len(journal.histories()["run"].damaged) == 1
        await journal.cover(snapshot(2), [], 2)
        assert journal.num_bytes == len(entry(3).payload)


async def test_whoever_opens_it_fences_the_one_before(tmp_path):
    async with opened(tmp_path) as old:
        await old.append(entry(1))
        async with opened(tmp_path) as new:
            assert new.epoch == old.epoch + 1
            with pytest.raises(Fenced):
                await old.append(entry(2))
            with pytest.raises(Fenced):
                await old.cover(snapshot(1), [], 1)
            await new.append(entry(3))
            assert [each.seq_id for each in (await new.history("run")).entries] == [1, 3]


async def test_closing_writes_what_was_asked_for(tmp_path):
    journal = Journal(tmp_path)
    for n in range(50):
        journal.append(entry(n))
    journal.close()
    assert len((await read(tmp_path))["run"].entries) == 50


# damage -----------------------------------------------------------------------------------------------


def _flip(path: Path, needle: bytes) -> None:
    data = bytearray(path.read_bytes())
    data[data.index(needle) + 3] ^= 1
    path.write_bytes(data)


async def test_a_flipped_byte_marks_its_run_and_no_other(tmp_path):
    marker = os.urandom(40)
    await write(tmp_path, entry(1), entry(2, payload=marker), entry(3), entry(2, "other"))
    _flip(tmp_path / "journal.sqlite", marker)
    histories = await read(tmp_path)
    assert [each.seq_id for each in histories["run"].damaged] == [2]
    assert [each.seq_id for each in histories["run"].entries] == [1, 3]
    assert histories["other"].damaged == []


async def test_an_unreadable_page_marks_runs_and_leaves_the_others(tmp_path):
    big = [entry(n, run, os.urandom(3000)) for n in range(8) for run in ("a", "b")]
    await write(tmp_path, *big)
    path = tmp_path / "journal.sqlite"
    data = bytearray(path.read_bytes())
    at = data.index(big[-1].payload) // 4096 * 4096
    data[at : at + 2] = b"\xff\xff"  # no page of a table begins like this
    path.write_bytes(data)
    histories = await read(tmp_path)
    assert {run for run, history in histories.items() if history.damaged} & {"a", "b"}


def _copy_of_live_journal(root: Path, target: Path) -> Path:
    """What a power cut leaves: the files as they are while somebody writes."""
    target.mkdir()
    shutil.copytree(root / "runs", target / "runs")
    for name in ("journal.sqlite", "journal.sqlite-wal"):
        (target / name).write_bytes((root / name).read_bytes())
    return target


@pytest.mark.parametrize("damage", ["cut", "flip"])
async def test_a_torn_tail_recovers_to_the_last_whole_record_and_says_so(tmp_path, caplog, damage):
    async with opened(tmp_path / "live") as journal:
        await journal.append(entry(1))
        await journal.append(entry(2))
        torn = _copy_of_live_journal(tmp_path / "live", tmp_path / "torn")
        whole = _copy_of_live_journal(tmp_path / "live", tmp_path / "whole")
    log = torn / "journal.sqlite-wal"
    data = bytearray(log.read_bytes())
    if damage == "cut":
        log.write_bytes(data[:-100])
    else:
        data[-100] ^= 1
        log.write_bytes(data)
    with caplog.at_level(logging.WARNING):
        assert [each.seq_id for each in (await read(whole))["run"].entries] == [1, 2]
        assert not caplog.records
        assert [each.seq_id for each in (await read(torn))["run"].entries] == [1]
    assert "everything before it is kept" in caplog.text


# a full disk ------------------------------------------------------------------------------------------


async def test_a_full_disk_delays_and_loses_nothing(tmp_path):
    async with opened(tmp_path) as journal:
        await journal.append(entry(0))
        with journal._engine.connect() as connection:
            pages = connection.exec_driver_sql("PRAGMA page_count").scalar()
            connection.exec_driver_sql(f"PRAGMA max_page_count={pages}")
        waiting = [journal.append(entry(n, payload=os.urandom(5000))) for n in range(1, 4)]
        async with asyncio.timeout(20):
            while journal.stalled is None:
                await asyncio.sleep(0.01)
        assert "full" in journal.stalled
        assert not any(future.done() for future in waiting)
        with journal._engine.connect() as connection:
            connection.exec_driver_sql("PRAGMA max_page_count=1000000")
        async with asyncio.timeout(20):
            await asyncio.gather(*waiting)
        assert journal.stalled is None
        assert [each.seq_id for each in (await journal.history("run")).entries] == [0, 1, 2, 3]


async def test_what_a_full_disk_makes_it_try_again_is_taken_off_once(tmp_path):
    async with opened(tmp_path) as journal:
        for n in range(3):
            await journal.append(entry(n))
        with journal._engine.connect() as connection:
            pages = connection.exec_driver_sql("PRAGMA page_count").scalar()
            connection.exec_driver_sql(f"PRAGMA max_page_count={pages}")
        with held(journal, "update") as writing:  # so that the others share a transaction
            first = journal.flush()
            await reach(writing)
            waiting = [
                journal.cover(snapshot(1), [], 1),
                journal.append(entry(3, payload=os.urandom(50_000))),
            ]
        await first
        async with asyncio.timeout(20):
            while journal.stalled is None:
                await asyncio.sleep(0.01)
        with journal._engine.connect() as connection:
            connection.exec_driver_sql("PRAGMA max_page_count=1000000")
        async with asyncio.timeout(20):
            await asyncio.gather(*waiting)
        assert journal.num_bytes == len(entry(2).payload) + 50_000


# kill -9 ----------------------------------------------------------------------------------------------

WRITER = """
import asyncio, sys
from twinkle_serve.storage.journal import Journal
from twinkle_serve.storage.journal_rows import JournalEntry, StoredSnapshot

async def main():
    journal = Journal(sys.argv[1])
    last = journal.histories().get("run")
    first = max([e.seq_id for e in last.entries] + [s.covered for s in last.snapshots]) + 1 if last else 0
    for base in range(first, first + 100_000, 8):
        numbers = range(base, base + 8)
        futures = [journal.append(JournalEntry("run", n, str(n), b"x" * 2000, 0.0)) for n in numbers]
        futures.append(journal.cover(StoredSnapshot("run", base, "f", 1, 0.0), [], base - 8))
        await asyncio.gather(*futures)
        print(base + 7, flush=True)

asyncio.run(main())
"""


async def test_kill_9_at_any_time_loses_nothing_that_was_answered(tmp_path):
    rng = random.Random(5)
    for _ in range(6):
        process = subprocess.Popen([sys.executable, "-c", WRITER, str(tmp_path)], stdout=subprocess.PIPE)
        assert process.stdout is not None
        acknowledged = [int(process.stdout.readline()) for _ in range(rng.randint(1, 12))][-1]
        os.kill(process.pid, signal.SIGKILL)
        rest = process.stdout.read().split()
        acknowledged = max([acknowledged, *map(int, rest)])
        process.wait()
        process.stdout.close()
        history = (await read(tmp_path))["run"]
        seqs = [each.seq_id for each in history.entries]
        assert history.damaged == []
        assert seqs[-1] >= acknowledged
        assert seqs == list(range(seqs[0], seqs[-1] + 1)), "a hole"
        assert seqs[0] <= max(each.covered for each in history.snapshots) + 1


def test_the_file_is_an_ordinary_sqlite_database(tmp_path):
    asyncio.run(write(tmp_path, entry(7)))
    with sqlite3.connect(tmp_path / "journal.sqlite") as connection:
        assert connection.execute("select run_id, seq_id from journal_entries").fetchall() == [("run", 7)]
    connection.close()
