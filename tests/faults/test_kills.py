"""SIGKILL at any time: the clients finish, and their losses, samples and weights are those of a quiet run.

Each case is a few strikes at one server while both programs of sdk_loop.py run on it, seed by seed at other
places. One seed in ``make test``; ``make test-faults`` runs TWINKLE_FAULT_SEEDS=50, which strikes each victim
at each place many times.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.faults.conftest import Server
from tests.faults.loops import STEPS, loops
from tests.faults.proxy import bad_network

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
NUM_SEEDS = int(os.environ.get("TWINKLE_FAULT_SEEDS", "1"))
DEPLOYMENTS = ["local"]
# Neighbours strike together: the first seed, which is all that `make test` runs, has each place once.
PLACES = [
    ["in backward", "in optimizer", "in replay"],
    ["in journal", "in save", "after backward"],
    ["before backward", "in sample", None],
    ["in snapshot", "in replay"],
]
VICTIMS = ["rank", "coordinator", "ingress", "everything"]


def places(victim: str, seed: int) -> list[str | None]:
    return PLACES[(VICTIMS.index(victim) + seed) % len(PLACES)]


def test_every_victim_is_struck_at_every_place():
    everywhere = {place for group in PLACES for place in group}
    assert len(everywhere) == 10
    for victim in VICTIMS:
        assert {place for seed in range(4) for place in places(victim, seed)} == everywhere


@pytest.fixture(scope="module", params=DEPLOYMENTS)
def deployment(request: pytest.FixtureRequest) -> Path:
    return Path(__file__).parents[2] / "deployments" / f"{request.param}.yaml"


@pytest.fixture(scope="module")
def quiet(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path, deployment: Path) -> dict[str, Any]:
    """What the programs see when nothing happens."""
    server = Server(tmp_path_factory.mktemp("quiet"), tiny_llama, deployment)
    server.start()
    try:
        with loops(server.url, server.root) as both:
            return both.seen(server.store)
    finally:
        server.stop()


@pytest.mark.parametrize("victim", VICTIMS)
@pytest.mark.parametrize("seed", range(NUM_SEEDS))
def test_a_kill_changes_nothing(
    tmp_path: Path,
    server_on: Callable[[Path, Path], Any],
    deployment: Path,
    quiet: dict[str, Any],
    victim: str,
    seed: int,
) -> None:
    rng = random.Random(f"{victim} {seed}")
    struck = places(victim, seed)
    with server_on(tmp_path, deployment) as server, loops(server.url, tmp_path) as both:
        steps = sorted(rng.sample(range(1, STEPS["sft"] - 4), len(struck)))
        for step, place in zip(steps, rng.sample(struck, len(struck)), strict=True):
            both.wait_for(step)
            server.strike(victim, place, rng)
        assert both.seen(server.store) == quiet


@pytest.mark.parametrize("seed", range(NUM_SEEDS))
def test_a_bad_network_changes_nothing(
    tmp_path: Path,
    server_on: Callable[[Path, Path], Any],
    deployment: Path,
    quiet: dict[str, Any],
    seed: int,
) -> None:
    with server_on(tmp_path, deployment) as server, bad_network(server.url, seed) as proxy:
        with loops(f"http://127.0.0.1:{proxy.port}", tmp_path) as both:
            assert both.seen(server.store) == quiet
        assert min(proxy.counts[fate] for fate in ("lost", "twice", "late")) >= 2
