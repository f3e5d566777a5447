"""Damage to the journal's own file, not to its log: what can be read is, and no hole goes unnoticed."""

from __future__ import annotations

import asyncio
import logging
import random
import shutil
import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest

from twinkle_serve.storage.journal import Journal
from twinkle_serve.storage.journal_rows import GAP, JournalEntry, RunHistory, StoredResult, StoredSnapshot
from twinkle_serve.storage.rescue import _has_hole, rescue

RUNS = ("session-a:train:0", "session-b:train:0", "session-c:train:0")
NUM_EACH = 12
PAGE = 4096


def _entry(run_id: str, seq_id: int, **more: object) -> JournalEntry:
    # Some of a row's bytes and some of several pages.
    payload = random.Random(f"{run_id} {seq_id}").randbytes(700 if seq_id % 4 else 9000)
    return JournalEntry(run_id, seq_id, f"{run_id}-{seq_id}", payload, 0.0, **more)  # type: ignore[arg-type]


async def _write(root: Path, *jobs: Callable[[Journal], asyncio.Future[None]]) -> None:
    journal = Journal(root)
    await asyncio.gather(*(job(journal) for job in jobs))
    journal.close()


def _entries(**more: object) -> list[Callable[[Journal], asyncio.Future[None]]]:
    entries = [_entry(run_id, seq_id) for seq_id in range(NUM_EACH) for run_id in RUNS]
    return [lambda journal, entry=entry: journal.append(entry) for entry in entries]  # type: ignore[misc]


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A journal that was closed in order: all of its rows are in its file."""
    root = tmp_path_factory.mktemp("written")
    asyncio.run(_write(root, *_entries()))
    return root / "journal.sqlite"


@pytest.fixture
def file(written: Path, tmp_path: Path) -> Path:
    shutil.copytree(written.parent / "runs", tmp_path / "runs")
    return Path(shutil.copy(written, tmp_path / "journal.sqlite"))


def _read(file: Path) -> dict[str, RunHistory]:
    journal = Journal(file.parent)
    try:
        return journal.histories()
    finally:
        journal.close()


def _change(file: Path, change: Callable[[bytearray], None]) -> None:
    data = bytearray(file.read_bytes())
    change(data)
    file.write_bytes(data)


def _seq_ids(histories: dict[str, RunHistory], run_id: str) -> list[int]:
    return [entry.seq_id for entry in histories.get(run_id, RunHistory()).entries]


def _marked(histories: dict[str, RunHistory]) -> set[str]:
    return {run_id for run_id, history in histories.items() if history.damaged}


def _assert_no_hole_unmarked(histories: dict[str, RunHistory]) -> None:
    for run_id in RUNS:
        seq_ids = _seq_ids(histories, run_id)
        assert seq_ids == list(range(len(seq_ids))) or run_id in _marked(histories), (run_id, seq_ids)


async def _goes_on(file: Path) -> None:
    """What is asked of the journal now is written and found."""
    journal = Journal(file.parent)
    await journal.append(_entry("new", 0))
    assert [entry.seq_id for entry in (await journal.history("new")).entries] == [0]
    journal.close()


def test_a_whole_file_is_left_alone(file: Path) -> None:
    before = file.read_bytes()
    assert rescue(file) is None
    assert file.read_bytes() == before
    assert rescue(file.with_name("never.sqlite")) is None
    assert {path.name for path in file.parent.iterdir()} == {file.name, "runs"}


@pytest.mark.parametrize("pages", [1, 2, 3, 6, 17, 33])
async def test_a_file_that_is_cut_short_recovers_to_its_last_whole_records_and_says_so(
    file: Path, caplog: pytest.LogCaptureFixture, pages: int
) -> None:
    _change(file, lambda data: data.__delitem__(slice(-pages * PAGE - 100, None)))
    with caplog.at_level(logging.ERROR):
        histories = _read(file)
    assert "is damaged: database disk image is malformed; read and kept: " in caplog.text
    _assert_no_hole_unmarked(histories)
    kept = sum(len(_seq_ids(histories, run_id)) for run_id in RUNS)
    assert (
        kept >= 3 * NUM_EACH * (34 - pages) / 34 - 12
    )  # no more is lost than was cut off, and its neighbours
    await _goes_on(file)
    assert _marked(_read(file)) == _marked(histories)


@pytest.mark.parametrize("seed", range(40))
async def test_a_flipped_byte_anywhere_costs_one_run_at_most(file: Path, seed: int) -> None:
    size = file.stat().st_size
    rng = random.Random(seed)
    at = rng.randrange(size if seed % 2 else 3 * PAGE)  # what leads to the rows is at the beginning
    _change(file, lambda data: data.__setitem__(at, data[at] ^ 0x5A))
    histories = _read(file)
    _assert_no_hole_unmarked(histories)
    lost = {run_id for run_id in RUNS if len(_seq_ids(histories, run_id)) < NUM_EACH}
    assert lost <= _marked(histories)
    assert len(lost) <= 1
    await _goes_on(file)


@pytest.mark.parametrize("page", [0, 9, 15, 24, 33, 34])
async def test_a_page_of_nonsense_costs_the_runs_that_it_held(file: Path, page: int) -> None:
    _change(file, lambda data: data.__setitem__(slice(page * PAGE, (page + 1) * PAGE), b"\xa7" * PAGE))
    histories = _read(file)
    _assert_no_hole_unmarked(histories)
    lost = {run_id: NUM_EACH - len(_seq_ids(histories, run_id)) for run_id in RUNS}
    assert sum(lost.values()) <= (0 if page == 0 else 6)
    assert _marked(histories) == {run_id for run_id in RUNS if lost[run_id]}
    await _goes_on(file)


async def test_results_and_snapshots_are_kept_and_the_epoch_goes_on(tmp_path: Path) -> None:
    result = StoredResult(RUNS[0], 3, "r3", b"result", 1.0)
    snapshot = StoredSnapshot(RUNS[0], 3, "file", 10, 1.0)
    await _write(tmp_path, *_entries(), lambda journal: journal.cover(snapshot, [result], -1))
    file = tmp_path / "journal.sqlite"
    _change(file, lambda data: data.__delitem__(slice(-2 * PAGE, None)))
    journal = Journal(tmp_path)
    history = journal.histories()[RUNS[0]]
    journal.close()
    assert (history.results, history.snapshots) == ([result], [snapshot])
    assert journal.epoch == 2


def _without(file: Path, where: str) -> None:
    """A journal in which these entries cannot be found any more, in a file that is cut short."""
    with closing(sqlite3.connect(file)) as connection:
        connection.execute(f"DELETE FROM journal_entries WHERE {where}")
        connection.commit()
        num_pages = connection.execute("PRAGMA page_count").fetchone()[0]
    # Pages that were freed are missing now.
    _change(file, lambda data: data.__setitem__(slice(28, 32), (num_pages + 1).to_bytes(4, "big")))


async def test_only_a_hole_behind_the_newest_snapshot_matters(tmp_path: Path) -> None:
    snapshots = [StoredSnapshot(RUNS[0], 5, "a", 1, 0.0), StoredSnapshot(RUNS[1], 3, "b", 1, 0.0)]
    covers = [lambda journal, s=s: journal.cover(s, [], -1) for s in snapshots]
    await _write(tmp_path, *_entries(), *covers)
    _without(tmp_path / "journal.sqlite", "seq_id = 4")
    assert _marked(_read(tmp_path / "journal.sqlite")) == {RUNS[1], RUNS[2]}


async def test_what_a_log_went_on_without_is_no_hole(tmp_path: Path) -> None:
    gap = _entry(RUNS[0], 8, kind=GAP)
    await _write(tmp_path, *_entries(), lambda journal: journal.append(gap))
    _without(tmp_path / "journal.sqlite", "kind = 'command' AND seq_id = 7")
    assert _marked(_read(tmp_path / "journal.sqlite")) == {RUNS[1], RUNS[2]}


async def test_without_any_entry_each_run_that_there_was_is_marked(tmp_path: Path) -> None:
    snapshot = StoredSnapshot(RUNS[1], 3, "b", 1, 0.0)
    await _write(tmp_path, *_entries(), lambda journal: journal.cover(snapshot, [], -1))
    _without(tmp_path / "journal.sqlite", "1")
    assert _marked(_read(tmp_path / "journal.sqlite")) == {RUNS[1]}


def test_the_damaged_file_is_kept(file: Path) -> None:
    _change(file, lambda data: data.__delitem__(slice(-PAGE, None)))
    damaged = file.read_bytes()
    _read(file)
    kept = file.with_name("journal.sqlite.damaged").read_bytes()
    assert kept[PAGE:] == damaged[PAGE:]


def test_a_rescue_that_was_interrupted_is_ended(file: Path) -> None:
    """It died when the new file was whole, and the old log perhaps gone already."""
    shutil.copy(file, file.with_name("journal.sqlite.rescued"))
    _change(file, lambda data: data.__delitem__(slice(PAGE, None)))
    histories = _read(file)
    assert all(_seq_ids(histories, run_id) == list(range(NUM_EACH)) for run_id in RUNS)
    assert not file.with_name("journal.sqlite.rescued").exists()


@pytest.mark.parametrize(
    ("seq_ids", "first", "expected"),
    [
        ({1, 2, 3}, 1, False),
        ({1, 3}, 1, True),
        ({1, 3}, 3, False),
        ({1, 3}, 2, True),
        ({2, 3}, 1, True),
        ({1, 2}, 5, False),
        ({1, 2**62}, 1, True),  # one that a client parked far ahead of all others
        ({1, 2**62}, 2**62, False),
    ],
)
def test_a_hole_is_a_number_that_is_missing_from_the_first_that_is_needed_on(
    seq_ids: set[int], first: int, expected: bool
) -> None:
    assert _has_hole(seq_ids, first) is expected
