"""Gauges of the service in Ray's metrics, where Prometheus and the Ray dashboard find them.

Knows how a number becomes a gauge. Does not know what the numbers mean (control/driver.py, engine/engine.py).
"""

from __future__ import annotations

from collections.abc import Mapping

from ray.util.metrics import Gauge

PREFIX = "twinkle_"
DESCRIPTIONS = {
    "resident_adapters": "training runs in a slot",
    "paged_adapters": "training runs kept outside the slots",
    "requests_in_flight": "requests that the workers have not answered yet",
    "paged_host_bytes": "bytes of paged runs in host memory",
    "paged_disk_bytes": "bytes of paged runs on disk",
    "snapshot_host_bytes": "bytes of sampling snapshots in host memory",
    "kv_blocks_free": "blocks of the sampler's KV cache that no sequence uses",
}


class Gauges:
    """One gauge a name, with the base model as its tag."""

    def __init__(self) -> None:
        self._gauges = {
            name: Gauge(PREFIX + name, description=text, tag_keys=("model",))
            for name, text in DESCRIPTIONS.items()
        }

    def publish(self, by_model: Mapping[str, Mapping[str, float]]) -> None:
        """Set every gauge that is named in DESCRIPTIONS; a test keeps that list complete."""
        for model, values in by_model.items():
            for name, value in values.items():
                if name in self._gauges:
                    self._gauges[name].set(value, tags={"model": model})
