"""Who holds a tick up, told from beats alone."""

from __future__ import annotations

import pytest

from twinkle_serve.cluster.watch import stalled
from twinkle_serve.cluster.worker import Beat

TICK = 7
DEADLINE_S = 10.0
LONG = 1000.0


def _beat(
    idle_s: float, *, waits: bool = False, count: int = 5, phase: str = "passes", tick_id: int = TICK
) -> Beat:
    return Beat(tick_id, phase, count, idle_s, waits, "")


def _stalled(*beats: Beat | None, elapsed_s: float = LONG) -> int | None:
    return stalled(dict(enumerate(beats)), TICK, elapsed_s, DEADLINE_S)


def test_ranks_that_get_on_are_left_alone_however_long_the_tick_takes() -> None:
    assert _stalled(_beat(9.9), _beat(0.1)) is None


def test_a_rank_that_stands_still_is_found() -> None:
    assert _stalled(_beat(10.1)) == 0
    assert _stalled(_beat(0.1), _beat(10.1)) == 1


def test_who_waits_for_a_rank_that_gets_on_is_not_late() -> None:
    assert _stalled(_beat(500, waits=True), _beat(3)) is None


def test_not_the_waiting_rank_is_blamed_but_the_one_it_waits_for() -> None:
    assert _stalled(_beat(11, waits=True, count=1), _beat(10.5, count=9)) == 1


def test_when_all_wait_the_one_that_got_least_far_is_blamed() -> None:
    assert _stalled(_beat(11, waits=True, count=6), _beat(11, waits=True, count=5)) == 1
    assert _stalled(_beat(11, waits=True)) == 0


def test_a_rank_that_does_not_answer_is_late_once_the_tick_is_old_enough() -> None:
    assert _stalled(None, _beat(0), elapsed_s=9) is None
    assert _stalled(None, _beat(0), elapsed_s=11) == 0


def test_what_was_before_the_tick_does_not_count() -> None:
    assert _stalled(_beat(500, tick_id=TICK - 1), elapsed_s=9) is None
    assert _stalled(_beat(500), elapsed_s=9) is None
    assert _stalled(_beat(0, tick_id=TICK - 1), elapsed_s=11) == 0


@pytest.mark.parametrize("phase", ["move", "save"])
def test_a_disk_gets_more_time(phase: str) -> None:
    assert _stalled(_beat(99, phase=phase)) is None
    assert _stalled(_beat(101, phase=phase)) == 0


def test_nobody_is_late_when_all_have_finished() -> None:
    assert _stalled() is None
