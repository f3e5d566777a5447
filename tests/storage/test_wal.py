"""A flipped byte anywhere in the write-ahead log: nothing acknowledged disappears without a word."""

from __future__ import annotations

import asyncio
import logging
import random
import shutil
from pathlib import Path

import pytest

from twinkle_serve.storage.journal import Journal
from twinkle_serve.storage.journal_rows import JournalEntry, RunHistory
from twinkle_serve.storage.wal import mend

RUNS = ("session-a:train:0", "session-b:train:0", "session-c:train:0")
NUM_EACH = 12
HEADER, FRAME = 32, 24 + 4096


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files of a journal as a dead process leaves them: all of its rows are in the log."""
    root = tmp_path_factory.mktemp("live")
    copy = tmp_path_factory.mktemp("copy")

    async def write() -> None:
        journal = Journal(root)
        for seq_id in range(NUM_EACH):
            for run_id in RUNS:
                payload = random.Random(f"{run_id} {seq_id}").randbytes(700)
                await journal.append(JournalEntry(run_id, seq_id, f"{run_id}-{seq_id}", payload, 0.0))
        for name in ("journal.sqlite", "journal.sqlite-wal"):
            shutil.copy(root / name, copy / name)
        shutil.copytree(root / "runs", copy / "runs")
        journal.close()

    asyncio.run(write())
    return copy


@pytest.fixture
def journal(live: Path, tmp_path: Path) -> Path:
    return shutil.copytree(live, tmp_path / "journal")


def _wal(root: Path) -> Path:
    return root / "journal.sqlite-wal"


def _flip(root: Path, *offsets: int) -> None:
    data = bytearray(_wal(root).read_bytes())
    for offset in offsets:
        data[offset] ^= 0x5A
    _wal(root).write_bytes(data)


def _read(root: Path) -> dict[str, RunHistory]:
    journal = Journal(root)
    try:
        return journal.histories()
    finally:
        journal.close()


def _is_whole(history: RunHistory) -> bool:
    return [entry.seq_id for entry in history.entries] == list(range(NUM_EACH))


def test_a_whole_log_is_left_alone(journal):
    before = _wal(journal).read_bytes()
    assert mend(journal / "journal.sqlite") is None
    assert _wal(journal).read_bytes() == before
    assert all(_is_whole(history) for history in _read(journal).values())


def test_there_may_be_no_log_or_an_empty_one(tmp_path):
    assert mend(tmp_path / "journal.sqlite") is None
    _wal(tmp_path).touch()
    assert mend(tmp_path / "journal.sqlite") is None


@pytest.mark.parametrize("offset", [3, 9, 17, 27], ids=["magic", "page size", "salt", "checksum"])
def test_a_damaged_header_is_made_again(journal, offset):
    _flip(journal, offset)
    histories = _read(journal)
    assert all(_is_whole(histories[run_id]) for run_id in RUNS)


@pytest.mark.parametrize("field", [9, 17], ids=["salt", "checksum"])
def test_a_damaged_frame_header_costs_nothing(journal, field):
    _flip(journal, HEADER + 20 * FRAME + field)
    histories = _read(journal)
    assert all(_is_whole(histories[run_id]) for run_id in RUNS)


def test_what_is_wrong_is_said_and_the_file_is_kept(journal, caplog):
    _flip(journal, HEADER + 30 * FRAME + 2000)
    damaged = _wal(journal).read_bytes()
    with caplog.at_level(logging.ERROR):
        _read(journal)
    assert f"the log is damaged at byte {HEADER + 30 * FRAME}, in the middle" in caplog.text
    assert (journal / "journal.sqlite-wal.damaged").read_bytes() == damaged


@pytest.mark.parametrize("seed", range(60))
def test_a_flip_anywhere_in_the_middle_is_harmless_or_marks_a_run(journal, seed):
    size = len(_wal(journal).read_bytes())
    _flip(journal, random.Random(seed).randrange(size - 5 * FRAME))
    histories = _read(journal)
    lost = [run_id for run_id in RUNS if run_id not in histories or not _is_whole(histories[run_id])]
    marked = [run_id for run_id, history in histories.items() if history.damaged]
    assert bool(marked) >= bool(lost), (lost, marked)
    unreadable = {run_id for run_id in lost for each in histories[run_id].damaged if each.seq_id is None}
    assert len(lost) <= 1 or unreadable == set(lost)


def test_damage_at_the_end_drops_what_was_not_whole(journal, caplog):
    _flip(journal, len(_wal(journal).read_bytes()) - 100)
    with caplog.at_level(logging.ERROR):
        histories = _read(journal)
    assert "after its last whole transaction; everything before it is kept" in caplog.text
    assert [len(histories[run_id].entries) for run_id in RUNS] == [NUM_EACH, NUM_EACH, NUM_EACH - 1]
