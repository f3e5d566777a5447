from __future__ import annotations

import json

import pytest

from benchmarks.table import Row, Rows, line_of, reaches, read_rows, write


def test_targets_are_an_operator_and_a_number():
    assert reaches(0.85, ">= 0.85")
    assert not reaches(0.84, ">= 0.85")
    assert reaches(20, "<= 20")
    assert not reaches(20.1, "<= 20")
    with pytest.raises(ValueError, match="no target"):
        reaches(1, "about 1")


@pytest.mark.parametrize(
    ("row", "status"),
    [
        (Row("p", "w", 1.0), ""),
        (Row("p", "w", 1.0, target=">= 1"), "reached"),
        (Row("p", "w", 1.1, target="<= 1"), "missed"),
        (Row("p", "w", None, target="<= 1"), "skipped"),
        (Row("p", "w", None, failed=True), "failed"),
    ],
)
def test_a_row_knows_how_it_stands(row, status):
    assert row.status == status


def test_rows_are_printed_kept_and_read_again(tmp_path, capsys):
    path = tmp_path / "rows.jsonl"
    rows = Rows("tax", path)
    rows.add("speed", 0.9, target=">= 0.85", cpu={"server": 1.5}, detail={"rounds": 3})
    rows.skip("peer", "not installable: no wheel")
    assert read_rows(path) == rows.found
    printed = capsys.readouterr().out
    assert "0.9x" in printed
    assert "reached (>= 0.85)" in printed
    assert "not installable: no wheel" in printed
    assert read_rows(tmp_path / "nothing") == []


def test_a_row_that_misses_its_target_says_why_and_others_do_not():
    rows = Rows("tax")
    for value, target in ((0.9, ">= 0.85"), (0.8, ">= 0.85"), (0.8, "")):
        rows.add("speed", value, target=target, why="the proxy takes 20 ms")
    assert [row.note for row in rows.found] == ["", "the proxy takes 20 ms", ""]


def test_a_row_cut_short_by_a_kill_does_not_hide_the_others(tmp_path):
    path = tmp_path / "rows.jsonl"
    Rows("tax", path).add("speed", 1.0)
    with path.open("a") as file:
        file.write('{"part": "tax", "wh')
    assert [row.what for row in read_rows(path)] == ["speed"]


def test_a_line_names_the_figure_its_unit_and_its_aim():
    line = line_of(Row("tax", "optim_step adds", 12.345, "ms", "<= 20", load=0.5))
    assert "12.3 ms" in line
    assert "reached (<= 20)" in line
    assert "load  0.5" in line


def test_the_file_says_what_machine_and_how_each_row_stands(tmp_path):
    path = write([Row("tax", "speed", 2.0, target=">= 1")], tmp_path / "new", quick=True)
    tree = json.loads(path.read_text())
    assert tree["quick"] is True
    assert tree["machine"]["cores"] >= 1
    assert len(tree["machine"]["load"]) == 3
    assert tree["rows"][0]["status"] == "reached"
    assert path.stem == tree["at"][:10]
