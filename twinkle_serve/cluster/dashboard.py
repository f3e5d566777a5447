"""The Grafana dashboard, made from the table of metrics: `python -m twinkle_serve.cluster.dashboard FILE`.

Knows Grafana's JSON and which numbers belong side by side. Does not know who measures them; a query can only
name metrics that are in the table.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from twinkle_serve.control.metrics import BY_NAME

UID = "twinkle-serve"
_WIDTH, _HEIGHT = 12, 8
_COLUMNS = 24 // _WIDTH
_SOURCE = {"type": "prometheus", "uid": "${datasource}"}


@dataclass(frozen=True, slots=True)
class Query:
    """expression: PromQL in which ``{name}`` stands for a metric of the table and ``$model`` for the models
    that are chosen. legend: of each line."""

    expression: str
    legend: str


@dataclass(frozen=True, slots=True)
class Panel:
    """unit: as Grafana calls it."""

    title: str
    unit: str
    queries: tuple[Query, ...]
    text: str = ""
    stacked: bool = False


def rate(name: str, by: str, model: bool = True) -> Query:
    where = '{{model=~"$model"}}' if model else ""
    return Query(f"sum by ({by}) (rate({{{name}}}{where}[$__rate_interval]))", _legend(by))


def quantile(q: float, name: str, by: str, model: bool = True) -> Query:
    where = '{{model=~"$model"}}' if model else ""
    buckets = f"sum by (le, {by}) (rate({{{name}}}_bucket{where}[$__rate_interval]))"
    return Query(f"histogram_quantile({q}, {buckets})", f"p{round(100 * q)} {_legend(by)}")


def average(name: str, by: str) -> Query:
    parts = [
        f'sum by ({by}) (rate({{{name}}}_{part}{{{{model=~"$model"}}}}[$__rate_interval]))'
        for part in ("sum", "count")
    ]
    return Query(" / ".join(parts), _legend(by))


def gauge(name: str, legend: str, model: bool = True) -> Query:
    return Query(f"{{{name}}}" + ('{{model=~"$model"}}' if model else ""), legend)


def _legend(by: str) -> str:
    return " ".join(f"{{{{{label}}}}}" for label in by.split(", "))


ROWS: tuple[tuple[str, tuple[Panel, ...]], ...] = (
    (
        "Work",
        (
            Panel("Tokens by kind", "short", (rate("tokens", "model, kind"),), stacked=True),
            Panel("Tokens by tenant", "short", (rate("tokens", "tenant"),), stacked=True),
            Panel("Requests by kind and result", "reqps", (rate("requests", "kind, result"),)),
            Panel("Optimizer steps", "ops", (rate("optimizer_steps", "model"),)),
            Panel(
                "Time in the queue",
                "s",
                (quantile(0.5, "queue_seconds", "kind"), quantile(0.95, "queue_seconds", "kind")),
            ),
            Panel(
                "Time to the result",
                "s",
                (quantile(0.5, "request_seconds", "kind"), quantile(0.95, "request_seconds", "kind")),
            ),
            Panel(
                "Waiting and in flight",
                "short",
                (
                    gauge("runs_waiting", "runs waiting {{model}}"),
                    gauge("samples_waiting", "samples waiting {{model}}"),
                    gauge("requests_in_flight", "in flight {{model}}"),
                ),
            ),
            Panel("Model FLOPs utilization", "percentunit", (gauge("mfu_ratio", "{{model}}"),)),
        ),
    ),
    (
        "Ticks",
        (
            Panel(
                "Length of a tick",
                "s",
                (quantile(0.5, "tick_seconds", "model"), quantile(0.95, "tick_seconds", "model")),
            ),
            Panel("Time by phase", "s", (average("step_seconds", "model, phase"),), stacked=True),
            Panel("Fill of ticks that train", "percentunit", (average("tick_fill_ratio", "model"),)),
            Panel("Runs that share a tick", "short", (average("tick_runs", "model"),)),
        ),
    ),
    (
        "Memory",
        (
            Panel(
                "Adapters",
                "short",
                (
                    gauge("resident_adapters", "resident {{model}}"),
                    gauge("paged_adapters", "paged {{model}}"),
                ),
                stacked=True,
            ),
            Panel(
                "Paged adapters and snapshots",
                "bytes",
                (
                    gauge("paged_host_bytes", "paged, host {{model}}"),
                    gauge("paged_disk_bytes", "paged, disk {{model}}"),
                    gauge("snapshot_host_bytes", "snapshots {{model}}"),
                ),
            ),
            Panel(
                "KV cache in use",
                "percentunit",
                (
                    Query(
                        '1 - {kv_blocks_free}{{model=~"$model"}} / {kv_blocks}{{model=~"$model"}}',
                        "{{model}}",
                    ),
                ),
            ),
            Panel(
                "Memory by rank", "bytes", (gauge("rank_memory_bytes", "{{model}} rank {{rank}} {{kind}}"),)
            ),
        ),
    ),
    (
        "Safety",
        (
            Panel("Recoveries", "short", (Query("increase({recoveries}[1h])", "{{model}} in an hour"),)),
            Panel("Age of the oldest unsaved change", "s", (gauge("snapshot_age_seconds", "{{model}}"),)),
            Panel("Journal lag", "s", (gauge("journal_lag_seconds", "lag", model=False),)),
            Panel("Journal size", "bytes", (gauge("journal_bytes", "journal", model=False),)),
            Panel("Promises", "short", (gauge("promises", "{{state}}", model=False),), stacked=True),
            Panel("Sessions", "short", (gauge("sessions", "sessions", model=False),)),
        ),
    ),
    (
        "HTTP",
        (
            Panel("Requests by status", "reqps", (rate("http_requests", "status", model=False),)),
            Panel("Requests by route", "reqps", (rate("http_requests", "route", model=False),)),
            Panel(
                "Time to the answer",
                "s",
                (quantile(0.95, "http_seconds", "route", model=False),),
                "Polls are held on purpose, up to http.poll_hold_s.",
            ),
        ),
    ),
)


def written(query: Query) -> str:
    """The PromQL, with metrics' names as they are exported. Raises KeyError for one that does not exist."""
    return query.expression.format_map({name: metric.exported for name, metric in BY_NAME.items()})


def dashboard() -> dict[str, Any]:
    panels: list[dict[str, Any]] = []
    top = 0
    for title, row in ROWS:
        place = {"x": 0, "y": top, "w": 24, "h": 1}
        panels.append({"type": "row", "title": title, "collapsed": False, "gridPos": place, "panels": []})
        for index, panel in enumerate(row):
            x, y = index % _COLUMNS * _WIDTH, top + 1 + index // _COLUMNS * _HEIGHT
            panels.append(_graph(panel, x, y))
        top += 1 + -(-len(row) // _COLUMNS) * _HEIGHT
    for number, each in enumerate(panels, 1):
        each["id"] = number
    return {
        "uid": UID,
        "title": "Twinkle Serve",
        "tags": ["twinkle-serve"],
        "schemaVersion": 39,
        "refresh": "10s",
        "time": {"from": "now-1h", "to": "now"},
        "templating": {"list": [_datasource(), _models()]},
        "panels": panels,
    }


def _graph(panel: Panel, x: int, y: int) -> dict[str, Any]:
    targets = [
        {"refId": chr(ord("A") + i), "datasource": _SOURCE, "expr": written(q), "legendFormat": q.legend}
        for i, q in enumerate(panel.queries)
    ]
    stacking = {"mode": "normal" if panel.stacked else "none", "group": "A"}
    custom = {"fillOpacity": 20 if panel.stacked else 0, "stacking": stacking, "lineWidth": 1}
    return {
        "type": "timeseries",
        "title": panel.title,
        "description": panel.text,
        "datasource": _SOURCE,
        "gridPos": {"x": x, "y": y, "w": _WIDTH, "h": _HEIGHT},
        "targets": targets,
        "fieldConfig": {"defaults": {"unit": panel.unit, "custom": custom}, "overrides": []},
        "options": {"legend": {"displayMode": "list", "placement": "bottom"}, "tooltip": {"mode": "multi"}},
    }


def _datasource() -> dict[str, Any]:
    return {"name": "datasource", "type": "datasource", "query": "prometheus", "label": "Data source"}


def _models() -> dict[str, Any]:
    return {
        "name": "model",
        "type": "query",
        "label": "Model",
        "datasource": _SOURCE,
        "query": f"label_values({BY_NAME['resident_adapters'].exported}, model)",
        "refresh": 2,
        "includeAll": True,
        "allValue": ".*",
        "multi": True,
    }


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(json.dumps(dashboard(), indent=1) + "\n")
