"""One server for the tests of this directory: two tiny models, two ingress replicas, started as users do.

Its models have one rank, or as many as in the deployment file that TWINKLE_DEPLOYMENT names; the tests are
the same. ``make test-2rank`` runs them all against deployments/local-2rank.yaml, ``make test-haproxy`` with
TWINKLE_PROXY=haproxy.
"""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from twinkle_serve.config import load_config
from twinkle_serve.hub.losses import fetch_loss
from twinkle_serve.testing.server import RunningServer, running_server

FOCAL = Path(__file__).parent.parent.parent / "examples" / "losses" / "focal_cross_entropy"
PROGRAM = Path(__file__).parent / "sdk_program.py"


def ranks_of(deployment: str | None) -> tuple[dict[str, Any], dict[str, Any]]:
    """How the ranks of a mixture and of a dense model share it in a deployment file."""
    if deployment is None:
        return {}, {}
    (model,) = load_config(deployment).models
    shared = {"ranks": model.ranks, "sharding": model.sharding}
    # A dense model has no experts to split.
    return shared, shared | ({"sharding": "zero3"} if model.sharding == "expert_parallel" else {})


def whitelisted(path: Path) -> dict[str, Any]:
    """What `twinkle-serve losses CONFIG add` writes for a loss."""
    source = fetch_loss(str(path), None)
    return source.terms.model_dump() | {"path": str(path), "sha256": source.sha256}


@pytest.fixture(scope="package")
def server(
    tiny_moe: Path, tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[RunningServer]:
    directory = tmp_path_factory.mktemp("a server")
    config = directory / "config.yaml"
    moe, llama = ranks_of(os.environ.get("TWINKLE_DEPLOYMENT"))
    models = [
        {"name": "moe", "path": str(tiny_moe), **moe},
        {"name": "llama", "path": str(tiny_llama), **llama},
    ]
    tree = {
        "models": [model | {"num_threads": 1, "device": "cpu"} for model in models],
        "storage": {"root": str(directory / "store")},
        "http": {"replicas": 2, "proxy": os.environ.get("TWINKLE_PROXY", "serve")},
        "monitoring": {"log_file": str(directory / "server.jsonl"), "log_level": "DEBUG"},
        "losses": {"whitelist": [whitelisted(FOCAL)]},
    }
    config.write_text(json.dumps(tree))
    with running_server(config, log=directory / "server.log") as server:
        yield server


@pytest.fixture(scope="session")
def run_sdk_program() -> Callable[..., dict[str, Any]]:
    """Run the SDK program in a process of its own; what it saw."""

    def run(*arguments: str, **environment: str) -> dict[str, Any]:
        done = subprocess.run(
            [sys.executable, str(PROGRAM), *arguments],
            env=os.environ | {"TINKER_TELEMETRY": "0"} | environment,
            capture_output=True,
            text=True,
            timeout=240,
            check=False,
        )
        assert done.returncode == 0, done.stderr[-4000:]
        seen: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        return seen

    return run


@pytest.fixture(scope="session")
def sdk_program_seen(run_sdk_program: Callable[..., dict[str, Any]]) -> Callable[..., dict[str, Any]]:
    """What the SDK program saw when it last ran so; it runs if it did not yet."""
    return functools.cache(run_sdk_program)
