"""One local Ray for all tests of this directory."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import pytest

from twinkle_serve.config import ModelConfig


@pytest.fixture(scope="package")
def ray_cluster() -> Iterator[None]:
    """Gone, with what Ray put into the environment, before the tests of other directories start servers."""
    root = str(Path(__file__).parents[2])  # for workers to find tests.cluster
    # As private_ray has it: at Ray's own niceness of 15 a busy machine starves the ranks.
    switches = {"RAY_memory_monitor_refresh_ms": "0", "RAY_worker_niceness": "0"}
    with mock.patch.dict(os.environ, {"PYTHONPATH": root, **switches}):
        import ray

        ray.init(address="local", include_dashboard=False, num_cpus=2, log_to_driver=False)
        yield
        ray.shutdown()


@pytest.fixture
def standin() -> ModelConfig:
    return ModelConfig(name="tiny", path="standin", device="cpu")
