"""Curves on disk: there again afterwards, and never in the way."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from twinkle_serve.storage.histories import FOLDER, HistoryFiles

RUN = "session-ab/../c:train:0"


def test_what_was_saved_is_there_for_the_next(tmp_path: Path) -> None:
    HistoryFiles(tmp_path).save([(RUN, {"steps": {"loss": [1.0, None]}}), ("other", {})])
    assert HistoryFiles(tmp_path).load(RUN) == {"steps": {"loss": [1.0, None]}}
    assert HistoryFiles(tmp_path).load("third") is None
    assert {path.parent for path in tmp_path.rglob("*.json")} == {tmp_path / FOLDER}


def test_the_newest_counts(tmp_path: Path) -> None:
    files = HistoryFiles(tmp_path)
    for number in range(3):
        files.save([(RUN, {"number": number})])
    assert files.load(RUN) == {"number": 2}
    assert len(list((tmp_path / FOLDER).iterdir())) == 1


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe"])
def test_a_damaged_file_is_none(tmp_path: Path, content: bytes) -> None:
    files = HistoryFiles(tmp_path)
    files.save([(RUN, {})])
    (path,) = (tmp_path / FOLDER).iterdir()
    path.write_bytes(content)
    assert files.load(RUN) is None


def test_a_disk_that_refuses_costs_curves_only(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / FOLDER).write_text("a file where the folder should be")
    with caplog.at_level(logging.WARNING):
        HistoryFiles(tmp_path).save([(RUN, {})])
    assert "curves cannot be saved" in caplog.text
