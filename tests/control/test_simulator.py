from __future__ import annotations

from collections import Counter

import pytest

from tests.control.simulator import simulate


def schedules(seeds, crashes):
    counts: Counter = Counter()
    for seed in seeds:
        report = simulate(seed, crashes)
        counts += report.counts + Counter(ticks=report.num_ticks, shared=report.passes_together > 1)
    return counts


@pytest.mark.parametrize("part", range(4))
def test_random_schedules_apply_each_command_once_in_order(part):
    counts = schedules(range(part * 50, part * 50 + 50), crashes=False)
    for kind in ("pass", "forward", "optim", "save", "load", "snapshot"):
        assert counts[f"{kind} done"] > 0, kind
    for kind in ("bad", "rejected", "pass"):
        assert counts[f"{kind} failed"] > 0, kind
    assert counts["sample over"] > 0
    assert counts["shared"] > 10


def test_random_schedules_with_a_dying_group_answer_everything():
    counts = schedules(range(1000, 1060), crashes=True)
    assert counts["optim failed"] > 0
    assert counts["load done"] > 0


def test_a_seed_is_a_schedule():
    assert simulate(7, True) == simulate(7, True)
