from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import pytest

from benchmarks import common
from benchmarks.durability import Arm, step_times, turn_of
from twinkle_serve.config import StorageConfig


class Clock:
    """Stands still but where somebody works. CPU time is half of it."""

    def __init__(self) -> None:
        self.now = 0.0

    def work(self, seconds: Callable[[int], float]) -> Callable[[], None]:
        """Takes ``seconds(n)`` in its n-th call, from 1."""
        calls = 0

        def call() -> None:
            nonlocal calls
            calls += 1
            self.now += seconds(calls)

        return call


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    fake = SimpleNamespace(perf_counter=lambda: clock.now, process_time=lambda: clock.now / 2)
    monkeypatch.setattr(common, "time", fake)
    return clock


def nothing() -> None:
    pass


def test_what_comes_every_tenth_step_counts_by_a_tenth(clock: Clock) -> None:
    arms = {
        "off": Arm(clock.work(lambda n: 1.0), nothing),
        "on": Arm(clock.work(lambda n: 4.0 if n % 10 == 0 else 1.0), nothing),
    }
    times = step_times(arms, steps=20, turns=3)
    assert times["on"].wall / times["off"].wall == pytest.approx(1.3)
    assert times["on"].cpu / times["off"].cpu == pytest.approx(1.3)
    assert times["off"].cpu == pytest.approx(0.5)


def test_what_an_arm_leaves_behind_is_waited_for_in_its_own_turn(clock: Clock) -> None:
    arms = {
        "off": Arm(clock.work(lambda n: 1.0), nothing),
        "on": Arm(clock.work(lambda n: 1.0), clock.work(lambda n: 5.0)),
    }
    times = step_times(arms, steps=10, turns=2)
    assert times["off"].wall == pytest.approx(1.0)
    assert times["on"].wall == pytest.approx(1.5)


@pytest.mark.parametrize(("step_s", "steps"), [(0.01, 50), (0.4, 50), (1.0, 20), (60.0, 1)])
def test_a_turn_is_as_long_as_the_way_between_snapshots(step_s: float, steps: int) -> None:
    storage = StorageConfig(snapshot_every_steps=50, snapshot_replay_s=10.0)
    assert turn_of(storage, step_s) == steps
