from __future__ import annotations

import random
from dataclasses import replace

import pytest

from benchmarks.scale import DAY_S, Costs, Demand, GroupDay, Settings, arrivals, load_for, simulate
from benchmarks.scale_costs import FEW, MANY, RUNS, solve

COSTS = Costs(
    fixed_s=0.1, run_s=0.01, token_s=0.0001, page_s=0.005, page_bytes=1e6, journal_bytes_per_token=16.0
)
LIGHT = Demand(tenants=40, sessions=1.0, steps=5.0, tokens=512, think_s=1.0)


def test_the_costs_of_a_tick_are_found_again():
    fixed, run, token = 0.05, 0.01, 0.001
    ticks = [
        fixed + run * runs + token * tokens for runs, tokens in ((1, FEW), (RUNS, RUNS * FEW), (1, MANY))
    ]
    assert solve(*ticks) == pytest.approx((fixed, run, token))


def test_noise_makes_no_negative_costs():
    assert min(solve(0.1, 0.1, 0.09)) == 0


def test_arrivals_are_as_many_as_asked_and_follow_the_hour():
    demand = replace(LIGHT, tenants=10_000)
    times = arrivals(random.Random(0), demand, 10_000)
    assert len(times) == pytest.approx(10_000, rel=0.05)
    assert times == sorted(times)
    noon = sum(DAY_S * 0.4 < at < DAY_S * 0.6 for at in times)
    midnight = sum(at < DAY_S * 0.1 or at > DAY_S * 0.9 for at in times)
    assert noon > 4 * midnight


def test_no_demand_no_arrivals():
    assert arrivals(random.Random(0), replace(LIGHT, sessions=0.0), 40) == []


def test_one_session_alone_costs_what_its_ticks_cost():
    demand = Demand(tenants=1, sessions=1.0, steps=1e-9, tokens=512, think_s=1.0, swing=0.0)
    for seed in range(20):
        day = GroupDay(COSTS, demand, Settings(), 1, seed).run()
        if day.sessions == day.sessions_done == 1:
            break
    assert day.ticks == 1
    assert day.busy_s == pytest.approx(COSTS.tick(day.tokens, 1, 0))
    assert day.waits == [0.0]
    assert day.pages == 0


def test_every_session_is_done_when_there_is_room():
    found = simulate(COSTS, LIGHT, groups=2)
    assert found["sessions done"] == 1
    assert 0 < found["utilisation"] < 0.05
    assert found["queue p50 s"] < 0.2
    assert found["journal bytes a day"] == pytest.approx(16 * found["tokens a day"])


def test_a_cluster_that_is_too_small_is_busy_all_day_and_its_queues_grow():
    costs = replace(COSTS, fixed_s=20.0, run_s=5.0)  # few, long ticks: the same queues, less to simulate
    demand = LIGHT.scaled(load_for(costs, LIGHT, busy_groups=2.0))
    small, large = (simulate(costs, demand, groups) for groups in (1, 8))
    assert small["utilisation"] > 0.9
    assert large["utilisation"] < 0.7
    assert small["queue p99 s"] > 5 * large["queue p99 s"]
    assert small["sessions done"] < large["sessions done"]
    assert small["runs a tick"] > large["runs a tick"]


def test_more_runs_than_slots_are_paged():
    demand = replace(LIGHT, tenants=100, steps=20.0, sessions=4.0, think_s=300.0)
    few = simulate(COSTS, demand, 1, Settings(slots=2))
    many = simulate(COSTS, demand, 1, Settings(slots=64))
    assert many["adapters paged a day"] < 100 < 1000 < few["adapters paged a day"]
    assert few["paging bytes a day"] == 2e6 * few["adapters paged a day"]


def test_a_day_is_the_same_each_time():
    assert simulate(COSTS, LIGHT, 2) == simulate(COSTS, LIGHT, 2)
