from __future__ import annotations

import pytest

from benchmarks.plots import draw, progress
from benchmarks.table import Row


def test_progress_is_one_where_the_target_is_just_reached():
    assert progress(Row("p", "w", 0.85, target=">= 0.85")) == 1
    assert progress(Row("p", "w", 1.7, target=">= 0.85")) == 2
    assert progress(Row("p", "w", 40, target="<= 20")) == 0.5
    assert progress(Row("p", "w", 0, target="<= 0")) == 1
    assert progress(Row("p", "w", 3, target="<= 0")) == 0
    assert progress(Row("p", "w", 7.5)) == 7.5


def test_there_is_a_picture_for_each_part_that_has_a_figure(tmp_path):
    rows = [
        Row("tax", "speed", 0.9, target=">= 0.85"),
        Row("tax", "lost", 0, "requests", "<= 0"),
        Row("sweep", "at once", 3.0),
        Row("twinkle", "speed", None, note="not installed"),
    ]
    paths = draw(rows, tmp_path / "pictures")
    assert [path.name for path in paths] == ["tax.png", "sweep.png"]
    for path in paths:
        assert path.read_bytes().startswith(b"\x89PNG")
        assert path.stat().st_size > 5_000


def test_without_figures_there_are_no_pictures(tmp_path):
    assert draw([Row("tax", "speed", None)], tmp_path / "pictures") == []
    assert not (tmp_path / "pictures").exists()


@pytest.mark.parametrize("value", [0.0, 1e-9, 1e12])
def test_any_figure_can_be_drawn(tmp_path, value):
    assert len(draw([Row("p", "w", value, "us", "<= 1")], tmp_path)) == 1
