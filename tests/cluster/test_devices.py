"""Which models get the GPUs that there are."""

from __future__ import annotations

from typing import Any

import pytest
import ray

from twinkle_serve.cluster.devices import devices
from twinkle_serve.cluster.group import RayGroup
from twinkle_serve.config import Config, ModelConfig


@pytest.mark.parametrize(
    ("gpus", "models", "expected"),
    [
        (0, [{}, {}], "cpu cpu"),
        (1, [{}, {}], "cuda cpu"),
        (2, [{}, {}], "cuda cuda"),
        (1, [{"groups": 2}, {}], "cuda cpu"),
        (2, [{"groups": 2}, {}], "cuda cpu"),
        (1, [{"ranks": 2}, {}], "cpu cuda"),
        (1, [{}, {"device": "cuda"}], "cpu cuda"),
        (0, [{"device": "cuda"}, {}], "cuda cpu"),
        (1, [{"device": "cpu"}, {}], "cpu cuda"),
    ],
)
def test_gpus_go_to_those_who_must_have_them_and_then_in_order(
    gpus: int, models: list[dict[str, Any]], expected: str
) -> None:
    named = [
        {"name": f"m{index}", "path": "/m", "sharding": "zero3"} | model for index, model in enumerate(models)
    ]
    assert " ".join(devices(Config.model_validate({"models": named}).models, gpus).values()) == expected


def test_a_group_asks_for_gpus_as_the_deployment_says(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 4.0, "GPU": 1.0})
    config = ModelConfig(name="b", path="/b")
    assert RayGroup(config)._device() == ("cuda", {"GPU": 1})
    assert caplog.text == ""
    device, resources = RayGroup(config, device_of=lambda num_gpus: "cpu" if num_gpus == 1 else "?")._device()
    assert device == "cpu"
    assert "GPU" not in resources
    assert "b runs on the CPU: 1 GPUs are too few" in caplog.text
