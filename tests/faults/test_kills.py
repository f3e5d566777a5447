"""SIGKILL at any time: the client finishes, and its losses, samples and weights are those of a quiet run.

A few seeds in ``make test``; ``make test-faults`` runs TWINKLE_FAULT_SEEDS=50.
"""

from __future__ import annotations

import hashlib
import os
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.faults.conftest import Loop, Server
from tests.faults.proxy import bad_network

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
STEPS = 20
NUM_SEEDS = int(os.environ.get("TWINKLE_FAULT_SEEDS", "1"))
VICTIMS = ["rank", "coordinator", "ingress", "everything"]


def _weights(server: Server, path: str) -> str:
    """The sha256 of the final adapter."""
    (found,) = (server.root / "store" / "checkpoints").glob("*/weights/final/adapter_model.safetensors")
    assert path.endswith("/weights/final")
    return hashlib.sha256(found.read_bytes()).hexdigest()


def _seen(server: Server, loop: Loop) -> dict[str, Any]:
    seen = loop.result()
    return {"losses": seen["losses"], "samples": seen["samples"], "weights": _weights(server, seen["path"])}


@pytest.fixture(scope="module")
def quiet(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path) -> dict[str, Any]:
    """What the loop sees when nothing happens."""
    server = Server(tmp_path_factory.mktemp("quiet"), tiny_llama)
    server.start()
    try:
        return _seen(server, Loop(server.url, STEPS, server.root / "client.log"))
    finally:
        server.stop()


@pytest.mark.parametrize("victim", VICTIMS)
@pytest.mark.parametrize("seed", range(NUM_SEEDS))
def test_a_kill_changes_nothing(
    tmp_path: Path, server_on: Callable[[Path], Any], quiet: dict[str, Any], victim: str, seed: int
) -> None:
    rng = random.Random(f"{victim} {seed}")
    with server_on(tmp_path) as server:
        loop = Loop(server.url, STEPS, tmp_path / "client.log")
        strikes = sorted(rng.sample(range(1, STEPS - 1), 1 if victim == "everything" else 2))
        for step in strikes:
            loop.wait_for(step)
            time.sleep(rng.uniform(0, 0.3))
            server.kill(victim)
            if victim == "everything":
                server.start()
        assert _seen(server, loop) == quiet


@pytest.mark.parametrize("seed", range(NUM_SEEDS))
def test_a_bad_network_changes_nothing(
    tmp_path: Path, server_on: Callable[[Path], Any], quiet: dict[str, Any], seed: int
) -> None:
    with server_on(tmp_path) as server, bad_network(server.url, seed) as proxy:
        loop = Loop(f"http://127.0.0.1:{proxy.port}", STEPS, tmp_path / "client.log")
        assert _seen(server, loop) == quiet
        assert min(proxy.counts[fate] for fate in ("lost", "twice", "late")) >= 2
