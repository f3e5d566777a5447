"""Every number that the service reports about itself, in one table: name, kind, labels and what it means.

Knows names and meanings; docs/metrics.md and the Grafana dashboard are made from this table. Does not know
how a number gets to Prometheus (cluster/metrics.py), nor who measures it.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Protocol

PREFIX = "twinkle_"
# Ray puts this in front of whatever an application reports.
RAY_PREFIX = "ray_"
MAX_TENANT_LABELS = 500
_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)
_SHARES = (0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
_COUNTS = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0)


@dataclass(frozen=True, slots=True)
class Metric:
    """kind: "counter", "gauge" or "histogram"; boundaries: upper edges of a histogram's buckets."""

    name: str
    kind: str
    text: str
    labels: tuple[str, ...] = ("model",)
    boundaries: tuple[float, ...] = ()

    @property
    def exported(self) -> str:
        """Its name in Prometheus; a histogram's series add _bucket, _sum and _count."""
        suffix = "_total" if self.kind == "counter" else ""
        return RAY_PREFIX + PREFIX + self.name + suffix


_MODEL = ("model",)


def _counter(name: str, labels: tuple[str, ...], text: str) -> Metric:
    return Metric(name, "counter", text, labels)


def _gauge(name: str, labels: tuple[str, ...], text: str) -> Metric:
    return Metric(name, "gauge", text, labels)


def _histogram(name: str, labels: tuple[str, ...], boundaries: tuple[float, ...], text: str) -> Metric:
    return Metric(name, "histogram", text, labels, boundaries)


METRICS: tuple[Metric, ...] = (
    # at the door
    _counter("http_requests", ("route", "status"), "HTTP requests answered"),
    _histogram("http_seconds", ("route",), _SECONDS, "time to the answer; polls are held on purpose"),
    # work
    _counter(
        "requests", ("model", "kind", "result"), "requests that ended, by what they were and how they ended"
    ),
    _histogram(
        "queue_seconds", ("model", "kind"), _SECONDS, "from acceptance to the tick that takes the request"
    ),
    _histogram("request_seconds", ("model", "kind"), _SECONDS, "from acceptance to the result"),
    _counter(
        "tokens",
        ("model", "kind", "tenant"),
        "tokens by kind (train, forward, prompt, sampled) and by tenant (a hash)",
    ),
    _counter("optimizer_steps", _MODEL, "optimizer steps taken"),
    # ticks
    _histogram("tick_seconds", _MODEL, _SECONDS, "one tick, from sending it to its report"),
    _histogram(
        "step_seconds",
        ("model", "phase"),
        _SECONDS,
        "time of a tick by phase (move, passes, optim, save, sample)",
    ),
    _histogram(
        "tick_fill_ratio", _MODEL, _SHARES, "training tokens of a tick that has any, over planner.tick_tokens"
    ),
    _histogram("tick_runs", _MODEL, _COUNTS, "runs that share a tick which trains"),
    _gauge(
        "mfu_ratio",
        _MODEL,
        "floating point work of the passes since the last report over what the ranks could have done in the "
        "time of those passes; attention scores are not counted",
    ),
    _counter("recoveries", _MODEL, "times that a group of ranks was lost and started again"),
    # what is where
    _gauge("resident_adapters", _MODEL, "training runs in a slot"),
    _gauge("paged_adapters", _MODEL, "training runs kept outside the slots"),
    _gauge("requests_in_flight", _MODEL, "requests that the workers have not answered yet"),
    _gauge("runs_waiting", _MODEL, "runs with a request that waits for a tick"),
    _gauge("samples_waiting", _MODEL, "samples that wait for room in the decoder"),
    _gauge("paged_host_bytes", _MODEL, "bytes of paged runs in host memory"),
    _gauge("paged_disk_bytes", _MODEL, "bytes of paged runs on disk"),
    _gauge("snapshot_host_bytes", _MODEL, "bytes of sampling snapshots in host memory"),
    _gauge("kv_blocks_free", _MODEL, "blocks of the sampler's KV cache that no sequence uses"),
    _gauge("kv_blocks", _MODEL, "blocks of the sampler's KV cache"),
    _gauge(
        "rank_memory_bytes",
        ("model", "rank", "kind"),
        "memory of one rank's process: host (resident), device (allocated), device_peak (highest so far); "
        "and what the engine keeps in it: base, experts, packed, slots, gradients, moments, kv, "
        "sampling_adapters",
    ),
    # what is promised and what is safe
    _gauge("promises", ("state",), "requests by state: pending, or kept for their clients to fetch"),
    _gauge("sessions", (), "sessions of clients that are there"),
    _gauge("journal_lag_seconds", (), "age of the oldest accepted request that is not on disk yet"),
    _gauge("journal_bytes", (), "bytes of requests in the journal"),
    _gauge("snapshot_age_seconds", _MODEL, "age of the oldest change of a run that no snapshot on disk has"),
)
BY_NAME = {metric.name: metric for metric in METRICS}


class Meter(Protocol):
    """Where numbers go. Labels are exactly those of the table."""

    def add(self, name: str, amount: float, **labels: str) -> None:
        """To a counter."""
        ...

    def set(self, name: str, value: float, **labels: str) -> None:
        """A gauge."""
        ...

    def observe(self, name: str, value: float, **labels: str) -> None:
        """Into a histogram."""
        ...


class Silent:
    """A meter that nobody reads."""

    def add(self, name: str, amount: float, **labels: str) -> None:
        pass

    def set(self, name: str, value: float, **labels: str) -> None:
        pass

    def observe(self, name: str, value: float, **labels: str) -> None:
        pass


Key = tuple[str, tuple[tuple[str, str], ...]]


@dataclass
class Tally:
    """A meter that remembers: totals, last values, and each histogram's observations."""

    totals: dict[Key, float] = field(default_factory=dict)
    values: dict[Key, float] = field(default_factory=dict)
    observed: dict[Key, list[float]] = field(default_factory=dict)

    def add(self, name: str, amount: float, **labels: str) -> None:
        key = checked(name, "counter", labels)
        self.totals[key] = self.totals.get(key, 0.0) + amount

    def set(self, name: str, value: float, **labels: str) -> None:
        self.values[checked(name, "gauge", labels)] = value

    def observe(self, name: str, value: float, **labels: str) -> None:
        self.observed.setdefault(checked(name, "histogram", labels), []).append(value)

    @property
    def names(self) -> frozenset[str]:
        return frozenset(name for name, _ in [*self.totals, *self.values, *self.observed])

    def total(self, name: str, **labels: str) -> float:
        """The sum over all series that have these labels."""
        wanted = labels.items()
        return math.fsum(
            v for (n, have), v in self.totals.items() if n == name and wanted <= dict(have).items()
        )


def checked(name: str, kind: str, labels: dict[str, str]) -> Key:
    """The series' key; a name, kind or label that is not in the table is a bug."""
    metric = BY_NAME[name]
    assert metric.kind == kind, f"{name} is a {metric.kind}"
    assert set(labels) == set(metric.labels), f"{name} has the labels {metric.labels}, not {sorted(labels)}"
    return name, tuple(sorted(labels.items()))


def tenant_hash(tenant: str) -> str:
    """What stands for a tenant in metrics and logs: not the name, and the same everywhere."""
    return hashlib.sha256(tenant.encode()).hexdigest()[:10]


class TenantLabels:
    """Tenant labels for metrics. Each makes series that live for ever, so beyond a number all are "other"."""

    def __init__(self, most: int = MAX_TENANT_LABELS) -> None:
        self._most = most
        self._known: dict[str, str] = {}

    def of(self, tenant: str) -> str:
        label = self._known.get(tenant)
        if label is None:
            if len(self._known) >= self._most:
                return "other"
            label = self._known[tenant] = tenant_hash(tenant)
        return label


def markdown(metrics: Iterable[Metric] = METRICS) -> str:
    """The table of docs/metrics.md."""
    rows = ["| name in Prometheus | kind | labels | |", "|---|---|---|---|"]
    rows += [f"| `{m.exported}` | {m.kind} | {', '.join(m.labels)} | {m.text} |" for m in metrics]
    return "\n".join(rows) + "\n"
