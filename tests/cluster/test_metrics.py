"""Every number that the service reports has a documented gauge."""

from __future__ import annotations

from pathlib import Path

from tests.control.echo_group import EchoGroup
from tests.control.plane import Client, control_plane
from tests.control.virtual_time import run
from twinkle_serve.cluster.metrics import DESCRIPTIONS
from twinkle_serve.config import ModelConfig
from twinkle_serve.engine.engine import Engine
from twinkle_serve.protocol.work import Tick, TickReport


def test_each_gauge_of_driver_and_engine_is_described(tmp_path: Path, tiny_llama: Path) -> None:
    async def reported() -> set[str]:
        async with control_plane(tmp_path, EchoGroup()) as plane:
            await (await Client(plane).open()).create()
            return set(plane.gauges()["base"])

    engine = Engine(ModelConfig(name="tiny", path=str(tiny_llama), num_threads=1))
    (report,) = engine.run(Tick(1))
    engine.close()
    assert isinstance(report, TickReport)
    assert run(reported()) | set(report.gauges) == set(DESCRIPTIONS)
