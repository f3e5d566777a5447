"""The Grafana dashboard names what exists, and all of it."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from twinkle_serve.cluster import dashboard as module
from twinkle_serve.cluster.dashboard import Query, dashboard, written
from twinkle_serve.control.metrics import METRICS

COMMITTED = (
    Path(__file__).parents[2] / "deployments" / "monitoring" / "grafana" / "dashboards" / "twinkle-serve.json"
)
SERIES = {
    name
    for metric in METRICS
    for name in (
        [metric.exported + suffix for suffix in ("_bucket", "_sum", "_count")]
        if metric.kind == "histogram"
        else [metric.exported]
    )
}


def expressions() -> list[str]:
    panels = json.loads(COMMITTED.read_text())["panels"]
    return [target["expr"] for panel in panels for target in panel.get("targets", [])]


def test_the_committed_file_is_what_the_table_makes() -> None:
    again = "python -m twinkle_serve.cluster.dashboard " + str(COMMITTED.name)
    assert json.loads(COMMITTED.read_text()) == dashboard(), again


def test_each_query_names_only_series_that_exist() -> None:
    for expression in expressions():
        named = re.findall(r"ray_twinkle_\w+", expression)
        assert named, expression
        assert set(named) <= SERIES, expression


def test_each_metric_is_on_the_dashboard() -> None:
    text = " ".join(expressions())
    assert [metric.name for metric in METRICS if metric.exported not in text] == []


def test_each_query_groups_by_labels_that_its_metric_has() -> None:
    for expression in expressions():
        for labels, name in re.findall(r"sum by \(([^)]*)\) \(rate\((ray_twinkle_\w+)", expression):
            (metric,) = (m for m in METRICS if name.startswith(m.exported))
            assert set(labels.split(", ")) - {"le"} <= set(metric.labels), expression
        for name in re.findall(r"(ray_twinkle_\w+)\{model", expression):
            assert any(name.startswith(m.exported) and "model" in m.labels for m in METRICS), expression


def test_braces_and_parentheses_are_balanced() -> None:
    for expression in expressions():
        for left, right in ("()", "{}", "[]"):
            assert expression.count(left) == expression.count(right), expression


def test_a_metric_that_does_not_exist_cannot_be_named() -> None:
    with pytest.raises(KeyError):
        written(Query("{surprise}", ""))


def test_panels_do_not_overlap() -> None:
    taken = set()
    for panel in dashboard()["panels"]:
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not cells & taken
        taken |= cells
    assert len({panel["id"] for panel in dashboard()["panels"]}) == len(dashboard()["panels"])
    assert dashboard()["uid"] == module.UID
