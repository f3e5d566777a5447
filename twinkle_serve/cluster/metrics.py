"""The table of control/metrics.py as Ray metrics, where Prometheus and the Ray dashboard find them.

Knows Ray's counters, gauges and histograms. Does not know what the numbers mean or who measures them.
"""

from __future__ import annotations

from ray.util.metrics import Counter, Gauge, Histogram

from twinkle_serve.control.metrics import METRICS, PREFIX, Metric, checked


class RayMeter:
    """control.metrics.Meter of one process. Each metric is made when it is first used, so that a process
    reports only what it measures."""

    def __init__(self) -> None:
        self._made: dict[str, Counter | Gauge | Histogram] = {}

    def add(self, name: str, amount: float, **labels: str) -> None:
        checked(name, "counter", labels)
        # Ray's own inc refuses zero; but who wants to be told of the first failure needs the zero before it.
        self._of(name)._record(amount, tags=labels)

    def set(self, name: str, value: float, **labels: str) -> None:
        checked(name, "gauge", labels)
        self._of(name).set(value, tags=labels)

    def observe(self, name: str, value: float, **labels: str) -> None:
        checked(name, "histogram", labels)
        self._of(name).observe(value, tags=labels)

    def _of(self, name: str) -> Counter | Gauge | Histogram:
        if name not in self._made:
            self._made[name] = _ray_metric(next(metric for metric in METRICS if metric.name == name))
        return self._made[name]


def _ray_metric(metric: Metric) -> Counter | Gauge | Histogram:
    name = PREFIX + metric.name
    match metric.kind:
        case "counter":
            return Counter(name, description=metric.text, tag_keys=metric.labels)
        case "gauge":
            return Gauge(name, description=metric.text, tag_keys=metric.labels)
    boundaries = list(metric.boundaries)
    return Histogram(name, description=metric.text, boundaries=boundaries, tag_keys=metric.labels)
