"""SIGTERM in the middle of everything: the tick comes to its end, the server ends in time, and the next start
on the same storage goes on where it was. The clients only wait."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.faults.conftest import Standing
from tests.faults.loops import STEPS, loops
from twinkle_serve.cluster.private_ray import descendants

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
STOP_S = 30.0  # what Kubernetes gives by default


def test_sigterm_ends_in_time_and_changes_nothing(
    tmp_path: Path, standing: Standing, quiet: Callable[[str], dict[str, Any]]
) -> None:
    undisturbed = quiet("local")
    with standing.borrowed("local") as server, loops(server.url, tmp_path, STEPS) as both:
        both.wait_for(6)
        assert server.process is not None
        below = descendants(server.process.pid)
        before = len(server.log.read_text(errors="replace"))
        began = time.monotonic()
        server.stop()
        assert time.monotonic() - began < STOP_S
        assert server.process.returncode == 0
        assert [pid for pid in below if Path(f"/proc/{pid}").exists()] == []
        said = server.log.read_text(errors="replace")[before:]
        assert "stopping on SIGTERM" in said
        assert "killing what is left" not in said
        assert "did not stop in order" not in said
        server.start()
        assert both.seen(server.store) == undisturbed
