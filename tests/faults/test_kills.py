"""SIGKILL at any time: the clients finish, and their losses, samples and weights are those of a quiet run.

Each case is two or three strikes at a server while both programs of sdk_loop.py run on it, seed by seed at
other places. A server serves one case after another, so that each finds the runs of those before. One seed of
each victim in ``make test``; ``make test-faults`` has TWINKLE_FAULT_SEEDS=13, which are 52 cases and strike
every victim at every place of every deployment.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.faults.conftest import DEPLOYMENTS, Standing
from tests.faults.loops import STEPS, loops
from tests.faults.proxy import bad_network

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
NUM_SEEDS = int(os.environ.get("TWINKLE_FAULT_SEEDS", "1"))
# Neighbours strike together: the first seed, which is all that `make test` runs, has each place once.
PLACES = [
    ["in backward", "in optimizer", "in replay"],
    ["in journal", "in save", "after backward"],
    ["before backward", "in sample", None],
    ["in snapshot", "in replay"],
]
VICTIMS = ["rank", "coordinator", "ingress", "everything"]
NUM_NETWORKS = -(-NUM_SEEDS // 2)


def places(victim: str, seed: int) -> list[str | None]:
    return PLACES[(VICTIMS.index(victim) + seed) % len(PLACES)]


def deployment(victim: str, seed: int) -> str:
    """Which rank dies matters where there are two; so the first rank to die is one of two."""
    return DEPLOYMENTS[(seed // len(PLACES) + (victim == "rank")) % len(DEPLOYMENTS)]


# One deployment after the other: only one server is up at a time, and the last one serves the next tests too.
KILLS = sorted(
    ((victim, seed) for seed in range(NUM_SEEDS) for victim in VICTIMS),
    key=lambda kill: -DEPLOYMENTS.index(deployment(*kill)),
)


def test_every_victim_is_struck_at_every_place_of_every_deployment():
    everywhere = {place for group in PLACES for place in group}
    assert len(everywhere) == 10
    for victim in VICTIMS:
        seeds = range(len(PLACES) * len(DEPLOYMENTS))
        struck = {(deployment(victim, seed), place) for seed in seeds for place in places(victim, seed)}
        assert struck == {(each, place) for each in DEPLOYMENTS for place in everywhere}


@pytest.mark.parametrize(("victim", "seed"), KILLS)
def test_a_kill_changes_nothing(
    tmp_path: Path, standing: Standing, quiet: Callable[[str], dict[str, Any]], victim: str, seed: int
) -> None:
    name = deployment(victim, seed)
    undisturbed = quiet(name)
    rng = random.Random(f"{victim} {seed}")
    struck = places(victim, seed)
    with standing.borrowed(name) as server, loops(server.url, tmp_path, STEPS) as clients:
        steps = sorted(rng.sample(range(1, clients.num_steps - 4), len(struck)))
        for step, place in zip(steps, rng.sample(struck, len(struck)), strict=True):
            clients.wait_for(step)
            server.strike(victim, place, rng)
        assert clients.seen(server.store) == undisturbed


@pytest.mark.parametrize("seed", range(NUM_NETWORKS))
def test_a_bad_network_changes_nothing(
    tmp_path: Path, standing: Standing, quiet: Callable[[str], dict[str, Any]], seed: int
) -> None:
    undisturbed = quiet("local")
    with standing.borrowed("local") as server, bad_network(server.url, seed) as proxy:
        with loops(f"http://127.0.0.1:{proxy.port}", tmp_path, STEPS) as clients:
            assert clients.seen(server.store) == undisturbed
        assert min(proxy.counts[fate] for fate in ("lost", "twice", "late")) >= 2
