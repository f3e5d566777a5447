"""Our server as benchmarks start it: the command line of a user, a small configuration, one thread.

Knows configuration and where models are. Does not know what is asked of the server.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.measure import TreeClock
from twinkle_serve.testing.server import running_server

ROOT = Path(__file__).resolve().parent.parent
MODEL = "bench"
BEHIND_HAPROXY = {"http": {"proxy": "haproxy"}}
# A rank that spins while it waits would take the core that its clients need.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")


@dataclass(frozen=True, slots=True)
class Service:
    """A server that runs. clock: of its CPU time, all its processes. scratch: a directory for logs."""

    url: str
    clock: TreeClock
    scratch: Path


@contextmanager
def our_server(
    path: Path,
    *,
    model: Mapping[str, Any] | None = None,
    settings: Mapping[str, Any] | None = None,
    module: str | None = None,
    environment: Mapping[str, str] | None = None,
) -> Iterator[Service]:
    """Serve the model at ``path`` as MODEL. model, settings: more keys of the model and of the whole tree.
    module: of this repository, in place of the ``twinkle-serve`` command."""
    tree = {
        "models": [
            {"name": MODEL, "path": str(path), "num_threads": 1, "device": "cpu", **(model or {})},
        ],
        **(settings or {}),
    }
    with tempfile.TemporaryDirectory(prefix="bench-") as name:
        scratch = Path(name)
        config = scratch / "config.yaml"
        config.write_text(json.dumps({"storage": {"root": str(scratch / "store")}, **tree}))
        program = [sys.executable, "-m", module] if module else []
        variables = {"PYTHONPATH": str(ROOT), **(environment or {})}
        log = scratch / "server.log"
        with running_server(config, log=log, program=program, environment=variables) as server:
            yield Service(server.url, TreeClock(server.pid), scratch)
