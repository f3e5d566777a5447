from __future__ import annotations

import json
import os
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from benchmarks import suite
from benchmarks.measure import cpu_of
from benchmarks.table import Row

ROW = json.dumps({"part": "scale", "what": "speed", "value": 2.0})


@pytest.fixture
def options(tmp_path):
    return SimpleNamespace(models=tmp_path, scale=1.0, quick=False, rows=tmp_path / "rows.jsonl")


@pytest.fixture
def interpreter(tmp_path, monkeypatch):
    """Puts a shell script in the place of Python; it finds where its rows go as $rows."""

    def put(script: str) -> None:
        path = tmp_path / "interpreter"
        path.write_text(f'#!/bin/sh\nwhile [ "$1" != --rows ]; do shift; done\nrows=$2\n{script}\n')
        path.chmod(0o755)
        monkeypatch.setattr(suite.sys, "executable", str(path))

    return put


def test_a_parts_rows_are_taken_from_its_process(options, interpreter, tmp_path):
    interpreter(f"echo '{ROW}' > $rows")
    assert suite._in_own_process("scale", options, tmp_path / "found") == [Row("scale", "speed", 2.0)]


def test_a_part_that_dies_leaves_what_it_found_and_says_so(options, interpreter, tmp_path):
    interpreter(f"echo '{ROW}' > $rows; kill -9 $$")
    found = suite._in_own_process("scale", options, tmp_path / "found")
    assert [row.status for row in found] == ["", "failed"]
    assert "ended with -9" in found[1].note


def test_a_part_that_hangs_is_ended_with_all_it_started(options, interpreter, tmp_path, monkeypatch):
    monkeypatch.setattr(suite, "PARTS", {"scale": 0.0})
    monkeypatch.setattr(suite, "_START_S", 1.0)
    interpreter(f"echo '{ROW}' > $rows; sleep 1000 & echo $! > {tmp_path}/child; wait")
    found = suite._in_own_process("scale", options, tmp_path / "found")
    assert [row.status for row in found] == ["", "failed"]
    assert "ended after 1 s" in found[1].note
    child = int((tmp_path / "child").read_text())
    while cpu_of([child]) and " Z " not in Path(f"/proc/{child}/stat").read_text():
        time.sleep(0.01)  # it was killed; this ends, or the test's own deadline comes


def test_an_error_in_a_part_is_a_row_and_spoils_nothing(options, monkeypatch, capsys):
    def run(rows, budget, models):
        rows.add("speed", 2.0)
        assert budget.seconds == suite.PARTS["scale"]
        raise RuntimeError("a long story\nthe end of it")

    monkeypatch.setattr("benchmarks.scale.run", run)
    assert suite.run_part("scale", options) == 0
    rows = suite.read_rows(options.rows)
    assert [row.status for row in rows] == ["", "failed"]
    assert rows[1].note == "RuntimeError: the end of it"


def test_every_part_has_a_module_with_something_to_run():
    for part, module in suite.MODULES.items():
        source = (Path(suite.__file__).parent / f"{module.rpartition('.')[2]}.py").read_text()
        compile(source, module, "exec")
        assert f"def run_{part}(" in source or "\ndef run(" in source


def test_a_table_is_written_whatever_failed(monkeypatch, tmp_path):
    rows = [Row("tax", "speed", 2.0, target=">= 1"), Row("tax", "the rest of tax", None, failed=True)]
    monkeypatch.setattr(suite, "_in_own_process", lambda part, options, path: rows)
    assert suite.main(["--only", "tax", "--results", str(tmp_path), "--quick"]) == 1
    (path,) = tmp_path.glob("*.json")
    tree = json.loads(path.read_text())
    assert [row["status"] for row in tree["rows"]] == ["reached", "failed"]
    assert tree["quick"] is True
    assert os.listdir(tmp_path / path.stem) == ["tax.png"]
