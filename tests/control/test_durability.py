"""Nothing acknowledged is lost: random deaths of the group and the coordinator, thousands of times."""

from __future__ import annotations

import gc
import logging
import multiprocessing
import os
from collections import Counter
from concurrent.futures import ProcessPoolExecutor

import pytest

from tests.control.durable_simulator import simulate

NUM_SCHEDULES = int(os.environ.get("TWINKLE_SCHEDULES", "10000"))
SHARE = 100
CHAOS = ("group deaths", "coordinator deaths", "damaged")


def run_schedules(first: int) -> Counter[str]:
    logging.disable(logging.CRITICAL)
    gc.freeze()
    gc.disable()  # worlds are full of cycles, and a quarter of the time would go into looking for them
    counts: Counter[str] = Counter()
    for seed in range(first, min(first + SHARE, NUM_SCHEDULES)):
        try:
            counts += simulate(seed).counts
        except BaseException as error:
            raise AssertionError(f"schedule {seed}: {error}") from error
    gc.collect()
    return counts


@pytest.mark.timeout(1800)
def test_random_deaths_lose_nothing_and_repeat_nothing():
    """On all cores: each schedule is a world of its own."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(os.cpu_count(), mp_context=context) as pool:
        counts = sum(pool.map(run_schedules, range(0, NUM_SCHEDULES, SHARE)), Counter())
    for what in (*CHAOS, "load done", "load failed", "deleted", "births", "unnumbered", "sample over"):
        assert counts[what] > NUM_SCHEDULES / 200, what


@pytest.mark.parametrize("seed", [6432, 17206])
def test_schedules_that_once_broke_a_promise(seed: int):
    """6432: the listing of a load's snapshot waited for saves that a dead group had taken along. 17206: the
    group dies between a snapshot's outcome and the task that would list it."""
    simulate(seed)


def test_a_seed_is_a_schedule():
    assert simulate(11).counts == simulate(11).counts
