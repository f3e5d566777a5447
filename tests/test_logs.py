"""JSON lines in a file: their fields, several processes, rotation."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from twinkle_serve.config import MonitoringConfig
from twinkle_serve.logs import configure_logs

pytestmark = pytest.mark.usefixtures("loggers_as_before")
logger = logging.getLogger("twinkle_serve.test")


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_line_has_its_fields_and_no_others(tmp_path: Path) -> None:
    path = tmp_path / "logs" / "serve.jsonl"
    configure_logs(MonitoringConfig(log_file=path), "coordinator")
    extra = {"tenant": "ab12", "run": "s:train:0", "seq": 0, "request": "train-1", "key": "tml-secret"}
    logger.info("optim_step: %s", "done", extra=extra)
    (line,) = lines(path)
    assert line["message"] == "optim_step: done"
    assert (line["tenant"], line["run"], line["seq"], line["request"]) == ("ab12", "s:train:0", 0, "train-1")
    assert (line["component"], line["level"]) == ("coordinator", "INFO")
    assert line["time"].endswith("+00:00")
    assert "tml-secret" not in path.read_text()


def test_an_exception_stays_on_one_line(tmp_path: Path) -> None:
    path = tmp_path / "serve.jsonl"
    configure_logs(MonitoringConfig(log_file=path), "x")
    try:
        raise ValueError("first\nsecond")
    except ValueError:
        logger.exception("it failed")
    (line,) = lines(path)
    assert "first\nsecond" in line["exception"]


def test_without_a_file_it_is_text_on_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    configure_logs(MonitoringConfig(), "rank 0 of a%model")
    logger.info("the step is done")
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith("INFO rank 0 of a%model: the step is done")
    configure_logs(MonitoringConfig(), "again")
    logger.info("told once")
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_the_level_counts(tmp_path: Path) -> None:
    path = tmp_path / "serve.jsonl"
    configure_logs(MonitoringConfig(log_file=path, log_level="WARNING"), "x")
    logger.info("no")
    logger.warning("yes")
    assert [line["message"] for line in lines(path)] == ["yes"]


def test_a_file_that_was_moved_away_is_made_anew(tmp_path: Path) -> None:
    path = tmp_path / "serve.jsonl"
    configure_logs(MonitoringConfig(log_file=path), "x")
    logger.info("old")
    path.rename(tmp_path / "serve.jsonl.1")
    logger.info("new")
    assert [line["message"] for line in lines(path)] == ["new"]


def test_configuring_twice_writes_once(tmp_path: Path) -> None:
    path = tmp_path / "serve.jsonl"
    for _ in range(2):
        configure_logs(MonitoringConfig(log_file=path), "x")
    logger.info("once")
    assert len(lines(path)) == 1


def test_lines_of_several_processes_stay_whole(tmp_path: Path) -> None:
    path = tmp_path / "serve.jsonl"
    program = (
        "import logging, sys; from pathlib import Path\n"
        "from twinkle_serve.config import MonitoringConfig; from twinkle_serve.logs import configure_logs\n"
        "configure_logs(MonitoringConfig(log_file=Path(sys.argv[1])), sys.argv[2])\n"
        "for i in range(300): logging.getLogger('twinkle_serve.x').info('%s', sys.argv[2] * 200)\n"
    )
    children = [subprocess.Popen([sys.executable, "-c", program, str(path), name]) for name in "ab"]
    assert [child.wait(60) for child in children] == [0, 0]
    assert sorted(line["message"][0] for line in lines(path)) == ["a"] * 300 + ["b"] * 300
