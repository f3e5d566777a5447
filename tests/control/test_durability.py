"""Nothing that was acknowledged is lost: random deaths of the group and the coordinator, thousands of times.

TWINKLE_SCHEDULES sets how many (``make test-faults`` runs 10,000).
"""

from __future__ import annotations

import os
from collections import Counter

import pytest

from tests.control.durable_simulator import simulate

NUM_SCHEDULES = int(os.environ.get("TWINKLE_SCHEDULES", "400"))
NUM_PARTS = 8


@pytest.mark.timeout(3600)
@pytest.mark.parametrize("part", range(NUM_PARTS))
def test_random_deaths_lose_nothing_and_repeat_nothing(part):
    counts: Counter[str] = Counter()
    for seed in range(part, NUM_SCHEDULES, NUM_PARTS):
        counts += simulate(seed).counts
    for what in ("group deaths", "coordinator deaths", "damaged", "load done", "sample over"):
        assert counts[what] > 0, what


def test_a_seed_is_a_schedule():
    assert simulate(11).counts == simulate(11).counts
