"""SkyRL's ``tinker`` server on this machine's CPU, on the loopback address: installed once, started for a
while.

``python -m benchmarks.peers.skyrl`` makes its environment (about 2 GB, minutes). Knows how that release is
started and configured. Does not know what is asked of it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from benchmarks.measure import TreeClock, end_tree
from benchmarks.peers.environment import Environment, start, wait_for
from twinkle_serve.testing.server import free_port

# Its extra "jax" would bring CUDA's libraries; these are what that one and "tinker" ask for on a CPU.
PACKAGES = (
    "skyrl-tx==0.3.0",
    "torch==2.13.0",
    "jax>=0.8,<1.0",
    "flax>=0.12.2",
    "optax>=0.2.5",
    "tinker==0.16.1",
    "fastapi[standard]",
    "sqlmodel",
    "sqlalchemy[asyncio]",
    "aiosqlite",
    "asyncpg",
    "psycopg2-binary",
)
ENVIRONMENT = Environment("skyrl-tx 0.3.0", Path(".peers/skyrl"), PACKAGES, "2 GB")
# Its fastest form found; the default has twice the slots and the rank, and every step computes all of them.
_BACKEND = {"max_lora_adapters": 16, "max_lora_rank": 16}
# The server starts its engine with ``uv run ... -m MODULE``, which would make an environment from sources.
# This stands in its place, and uses the one that is there.
_UV = """#!/bin/sh
while [ "$1" != -m ]; do shift; done
exec "{python}" "$@"
"""


@contextmanager
def running_skyrl(python: Path, model: Path, scratch: Path) -> Iterator[tuple[str, TreeClock]]:
    """Serve ``model``, under its path as name; yields the address and a clock of the server's CPU time.
    Raises NotStarted."""
    scratch.mkdir(parents=True, exist_ok=True)
    scratch = scratch.resolve()
    port = free_port()
    process = start(
        [str(python), "-m", "tx.tinker.api", *_options(model.resolve(), scratch, port)],
        scratch / "server.log",
        os.environ | _variables(python, scratch),
        scratch,
    )
    try:
        for words in ("Application startup complete", "Starting background engine"):
            wait_for(words, scratch / "server.log", process, who="SkyRL")
        yield f"http://127.0.0.1:{port}", TreeClock(process.pid)
    finally:
        end_tree(process)


def _options(model: Path, scratch: Path, port: int) -> list[str]:
    return [
        *("--base-model", str(model), "--backend", "jax", "--backend-config", json.dumps(_BACKEND)),
        *("--database-url", f"sqlite:///{scratch / 'tinker.db'}"),
        *("--checkpoints-base", str(scratch / "checkpoints")),
        *("--host", "127.0.0.1", "--port", str(port)),
    ]


def _variables(python: Path, scratch: Path) -> dict[str, str]:
    stand_in = scratch / "bin" / "uv"
    stand_in.parent.mkdir(exist_ok=True)
    stand_in.write_text(_UV.format(python=python))
    stand_in.chmod(0o755)
    return {
        "PATH": f"{stand_in.parent}:{os.environ['PATH']}",
        "JAX_PLATFORMS": "cpu",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "COLUMNS": "300",  # a line of its log stays one line
    }


if __name__ == "__main__":
    ENVIRONMENT.main()
