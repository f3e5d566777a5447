"""The table of metrics reaches Prometheus through Ray, under the documented names."""

from __future__ import annotations

import time
import urllib.request
from pathlib import Path

import pytest
import ray

from tests.control.echo_group import EchoGroup
from tests.control.plane import Client, control_plane
from tests.control.virtual_time import run
from twinkle_serve.cluster.metrics import RayMeter
from twinkle_serve.config import ModelConfig
from twinkle_serve.control.metrics import BY_NAME, METRICS
from twinkle_serve.engine.engine import Engine
from twinkle_serve.protocol.work import Tick, TickReport


def prometheus_text() -> str:
    """What the node's agent tells Prometheus."""
    (node,) = ray.nodes()
    url = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
    with urllib.request.urlopen(url, timeout=10) as answer:
        return str(answer.read().decode())


def test_each_gauge_of_driver_and_engine_is_documented(tmp_path: Path, tiny_llama: Path) -> None:
    async def reported() -> set[str]:
        async with control_plane(tmp_path, EchoGroup()) as plane:
            await (await Client(plane).open()).create()
            return set(plane.gauges()["base"])

    engine = Engine(ModelConfig(name="tiny", path=str(tiny_llama), num_threads=1))
    (report,) = engine.run(Tick(1))
    engine.close()
    assert isinstance(report, TickReport)
    memory = {name for name in report.gauges if name.startswith("rank0/")}
    assert memory == {f"rank0/{use}_bytes" for use in engine.memory()}
    text = BY_NAME["rank_memory_bytes"].text
    assert all(name.removeprefix("rank0/").removesuffix("_bytes") in text for name in memory)
    others = {name for name in run(reported()) | set(report.gauges) if not name.startswith("rank0/")}
    assert others <= set(BY_NAME)


@pytest.mark.usefixtures("ray_cluster")
def test_every_metric_gets_to_prometheus_under_its_documented_name() -> None:
    meter = RayMeter()
    for metric in METRICS:
        method = {"counter": meter.add, "gauge": meter.set, "histogram": meter.observe}[metric.kind]
        method(metric.name, 1.0, **dict.fromkeys(metric.labels, "x"))
    deadline = time.monotonic() + 60  # Ray reports every ten seconds
    missing = {metric.exported for metric in METRICS}
    while missing and time.monotonic() < deadline:
        types = {line.split()[2] for line in prometheus_text().splitlines() if line.startswith("# TYPE")}
        missing -= types
        if missing:
            time.sleep(0.5)
    assert not missing


@pytest.mark.usefixtures("ray_cluster")
def test_a_counter_can_be_there_before_anything_was_counted() -> None:
    RayMeter().add("recoveries", 0, model="fresh")
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        lines = [line for line in prometheus_text().splitlines() if 'model="fresh"' in line]
        if lines:
            break
        time.sleep(0.5)
    assert [line.rpartition(" ")[2] for line in lines] == ["0.0"]


@pytest.mark.usefixtures("ray_cluster")
def test_what_is_not_in_the_table_is_refused() -> None:
    with pytest.raises(KeyError):
        RayMeter().add("surprise", 1.0)
    with pytest.raises(AssertionError):
        RayMeter().add("optimizer_steps", 1.0, model="m", run="r")
