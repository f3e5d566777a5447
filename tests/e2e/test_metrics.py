"""After a program has run, Prometheus finds every documented metric, and nothing in it names a user."""

from __future__ import annotations

import re
import time
import urllib.request
from collections.abc import Callable
from typing import Any

import pytest

from twinkle_serve.control.metrics import METRICS, tenant_hash
from twinkle_serve.testing.server import RunningServer

pytestmark = pytest.mark.slow
KEY = "tml-e2e"  # of sdk_program.py


def prometheus_text(server: RunningServer) -> str:
    """From the address that the server said at its start."""
    (url,) = re.findall(r"metrics at (http://\S+)", server.log.read_text())
    with urllib.request.urlopen(url, timeout=10) as answer:
        return str(answer.read().decode())


def test_every_documented_metric_is_there_after_a_run(
    server: RunningServer, sdk_program_seen: Callable[..., dict[str, Any]]
) -> None:
    sdk_program_seen(server.url, "moe")
    deadline = time.monotonic() + 90  # the service reports every five seconds, Ray every ten
    missing = {metric.exported for metric in METRICS}
    text = ""
    while missing and time.monotonic() < deadline:
        text = prometheus_text(server)
        missing = {name for name in missing if not re.search(rf"^{name}(_count)?\{{", text, re.M)}
        if missing:
            time.sleep(1.0)
    assert not missing
    types = dict(re.findall(r"^# TYPE (ray_twinkle_\w+) (\w+)$", text, re.M))
    assert types == {metric.exported: metric.kind for metric in METRICS}, "one that is not documented"
    assert KEY not in text
    assert "session-" not in text, "ids of runs would make a series for each"
    for phase in ("move", "passes", "optim", "save", "sample"):
        assert re.search(rf'^ray_twinkle_step_seconds_count\{{.*phase="{phase}"', text, re.M)
    for kind in ("train", "forward", "prompt", "sampled"):
        assert re.search(rf'^ray_twinkle_tokens_total\{{.*kind="{kind}"', text, re.M)
    tenants = set(re.findall(r'tenant="(\w+)"', text))
    assert all(len(tenant) == len(tenant_hash("x")) for tenant in tenants)
    shares = re.findall(r"^ray_twinkle_mfu_ratio\{.* (\S+)$", text, re.M)
    assert shares
    assert all(0 < float(share) < 1 for share in shares)
