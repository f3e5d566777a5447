from __future__ import annotations

import os
import subprocess
import sys
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.measure import (
    Budget,
    TreeClock,
    cpu_of,
    in_ms,
    in_turn,
    jain,
    name_of,
    quantile,
    ratio,
    tree_of,
    typical,
    worst_deviation,
)

shares = st.lists(st.floats(0.01, 1e6), min_size=1, max_size=20)


def test_quantiles_lie_between_neighbours():
    assert quantile([4, 1, 3, 2], 0.5) == 2.5
    assert quantile([1, 2, 3], 0) == 1
    assert quantile([1, 2, 3], 1) == 3
    assert quantile(range(101), 0.99) == 99
    assert quantile([7], 0.99) == 7


@pytest.mark.parametrize(("values", "q"), [([], 0.5), ([1], 1.1), ([1], -0.1)])
def test_a_quantile_of_nothing_is_an_error(values, q):
    with pytest.raises(ValueError, match="quantile"):
        quantile(values, q)


def test_fairness_is_one_if_all_are_equal_and_one_in_n_if_one_has_all():
    assert jain([3, 3, 3]) == 1
    assert jain([5, 0, 0, 0]) == 0.25
    assert jain([1, 2]) == pytest.approx(0.9)
    with pytest.raises(ValueError, match="got something"):
        jain([0, 0])


@given(shares, st.floats(0.1, 10))
def test_fairness_does_not_depend_on_scale_or_order(got, factor):
    fairness = jain(got)
    assert 1 / len(got) <= fairness + 1e-9 <= 1 + 2e-9
    assert jain([share * factor for share in reversed(got)]) == pytest.approx(fairness)


def test_deviation_is_relative_to_what_was_due():
    assert worst_deviation([10, 20, 40], [1, 2, 4]) == pytest.approx(0)
    assert worst_deviation([1, 3], [1, 1]) == pytest.approx(0.5)
    assert worst_deviation([0, 1], [1, 1]) == pytest.approx(1.0)


def test_a_ratio_is_of_medians():
    assert ratio([1, 100, 4], [2, 2, 1]) == 2


def test_arms_run_in_turn_and_every_second_round_backwards():
    order = []
    arms = {"a": lambda: order.append("a") or len(order), "b": lambda: order.append("b") or len(order)}
    found = in_turn(arms, rounds=2, seconds=1e9)
    assert "".join(order) == "ba" + "ab" + "ba"
    assert found == {"a": [3, 6], "b": [4, 5]}


def test_rounds_end_with_the_time_but_not_before_the_fewest():
    found = in_turn({"a": lambda: 1}, rounds=100, seconds=-1, min_rounds=4, warmup=0)
    assert found == {"a": [1] * 4}


def test_a_budget_gives_no_more_than_is_left():
    budget = Budget(100, False, time.monotonic() - 95)
    assert budget.left_s == pytest.approx(5, abs=1)
    assert budget.share(0.02) == pytest.approx(2)
    assert budget.share(0.5) == pytest.approx(5, abs=1)
    assert Budget(1, False, time.monotonic() - 95).share(0.5) == 0


def test_a_tree_has_all_that_a_process_started_and_what_they_used():
    child = "import subprocess, sys; sys.exit(subprocess.call([sys.executable, '-c', sys.argv[1]]))"
    burn = "import sys\nfor _ in range(300_000): pass\nprint('done', flush=True)\nsys.stdin.read()"
    with subprocess.Popen(
        [sys.executable, "-c", child, burn], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout.readline() == "done\n"
        pids = tree_of(process.pid)
        clock = TreeClock(process.pid)
        assert len(pids) == 2
        assert clock.pids == pids
        assert clock.seconds() == pytest.approx(sum(cpu_of(pids).values()), abs=0.1)
        assert clock.seconds() > 0
        assert sum(clock.by_name().values()) == pytest.approx(clock.seconds(), abs=0.1)
        assert all("python" in name_of(pid) for pid in pids)
        parts = clock.by_part()
        assert parts == {"replicas": 0, "proxy": 0, "coordinator": 0, "rank": 0, "others": parts["others"]}
        assert parts["others"] == pytest.approx(clock.seconds(), abs=0.1)
        assert clock.since(dict.fromkeys(parts, 0.0), 10)["others"] == pytest.approx(
            clock.seconds() / 10, abs=0.01
        )
        process.stdin.close()
    assert cpu_of(pids) == {}
    assert name_of(process.pid) == "gone"
    assert os.getpid() not in pids


def test_parts_of_a_server_are_told_by_the_titles_of_their_processes(monkeypatch):
    titles = ["ray::ServeReplica:twinkle:ingress", "ray::ServeReplica:twinkle:ingress.call", "haproxy"]
    titles += ["ray::ProxyActor", "ray::Coordinator", "ray::RankWorker.run_short_tick", "gcs_server"]
    monkeypatch.setattr(TreeClock, "by_name", lambda _: dict.fromkeys(titles, 1.0))
    assert TreeClock(os.getpid()).by_part() == {
        "replicas": 2.0,
        "proxy": 2.0,
        "coordinator": 1.0,
        "rank": 1.0,
        "others": 1.0,
    }


def test_parts_in_words_begin_with_the_largest():
    found = [{"cpu": {"rank": 0.2, "proxy": 0.003}}, {"cpu": {"rank": 0.4, "proxy": 0.001}}]
    assert typical(found, "cpu") == {"rank": pytest.approx(0.3), "proxy": pytest.approx(0.002)}
    assert in_ms({"proxy s/step": 0.003, "rank s/step": 0.0121, "others": 0.0004}) == "rank 12, proxy 3 ms"
