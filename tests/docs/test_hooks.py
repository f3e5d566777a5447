"""What the pages take from the code."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import pytest

HOOKS = Path(__file__).parents[2] / "docs" / "hooks.py"


@pytest.fixture
def hooks() -> ModuleType:
    spec = importlib.util.spec_from_file_location("hooks", HOOKS)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("row", "line"),
    [
        (
            {"part": "tax", "what": "speed", "value": 0.91, "unit": "x", "target": ">= 0.85", "load": 1.04},
            "| tax: speed | 0.91 x | >= 0.85 | 1.0 |",
        ),
        (
            {"part": "skyrl", "what": "speed", "value": 26.0, "unit": "x", "note": "it was not steady"},
            "| skyrl: speed | 26 x: it was not steady | – | 0.0 |",
        ),
        ({"what": "8 tenants", "ratio": 1.5, "why": "a | b"}, r"| 8 tenants | 1.5: a \| b | – | 0.0 |"),
        ({"what": "peer", "value": None, "note": "no wheel"}, "| peer | not measured: no wheel | – | 0.0 |"),
        ({"what": "peer", "value": None}, "| peer | not measured | – | 0.0 |"),
    ],
)
def test_a_figure_is_shown_with_what_is_to_be_known_of_it(
    hooks: ModuleType, row: dict[str, object], line: str
) -> None:
    assert hooks.measured_row(row) == line


def test_what_holds_of_a_whole_run_stands_above_its_rows(
    hooks: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    results = tmp_path / "benchmarks" / "results"
    results.mkdir(parents=True)
    rows = [{"what": "speed", "value": 1.0}]
    (results / "a.json").write_text(json.dumps({"note": "tests ran beside it", "rows": rows}))
    (results / "b.json").write_text(json.dumps({"rows": rows}))
    monkeypatch.setattr(hooks, "ROOT", tmp_path)
    first, second = hooks.measured().split("### b")
    assert first.startswith("### a\n\ntests ran beside it.\n\n| what |")
    assert "ran beside" not in second
