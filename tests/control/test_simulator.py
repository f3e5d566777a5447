from __future__ import annotations

import shutil
from collections import Counter

import pytest

from tests.control.simulator import simulate


def schedules(tmp_path, seeds, crashes):
    counts: Counter = Counter()
    for seed in seeds:
        report = simulate(seed, tmp_path / str(seed), crashes)
        shutil.rmtree(tmp_path / str(seed))
        counts += report.counts + Counter(ticks=report.num_ticks, shared=report.passes_together > 1)
    return counts


@pytest.mark.parametrize("part", range(4))
def test_random_schedules_apply_each_command_once_in_order(tmp_path, part):
    counts = schedules(tmp_path, range(part * 100, part * 100 + 100), crashes=False)
    for kind in ("pass", "forward", "optim", "save", "load", "snapshot"):
        assert counts[f"{kind} done"] > 0, kind
    for kind in ("bad", "rejected", "pass"):
        assert counts[f"{kind} failed"] > 0, kind
    assert counts["sample over"] > 0
    assert counts["shared"] > 10


def test_random_schedules_with_a_dying_group_answer_everything(tmp_path):
    counts = schedules(tmp_path, range(1000, 1100), crashes=True)
    assert counts["optim failed"] > 0
    assert counts["load done"] > 0


def test_a_seed_is_a_schedule(tmp_path):
    assert simulate(7, tmp_path / "a", True) == simulate(7, tmp_path / "b", True)
