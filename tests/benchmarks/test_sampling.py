from __future__ import annotations

from collections.abc import Sequence

from benchmarks.sampling import FOREVER_S, ONE_STEP_S, Ask, call_by_call, mixed, step_by_step


class Stub:
    """Decodes a token of every active ask a step, and writes down when each was admitted."""

    def __init__(self) -> None:
        self.clock = 0
        self.admitted: list[tuple[int, int]] = []  # when, and how many
        self.left: list[int] = []

    def __call__(self, due: Sequence[Ask], budget_s: float) -> int:
        if due:
            if not self.left:
                self.clock = max(self.clock, due[0].arrives)
            assert all(ask.arrives <= self.clock for ask in due), "admitted before it arrived"
            self.admitted.append((self.clock, len(due)))
        self.left += [ask.new_tokens for ask in due]
        while self.left:
            self.left = [left - 1 for left in self.left if left > 1]
            self.clock += 1
            if budget_s == ONE_STEP_S:
                break
            assert budget_s == FOREVER_S
        return len(self.left)


def test_nothing_is_admitted_before_it_arrives():
    stub = Stub()
    step_by_step(mixed(24), stub)
    assert stub.admitted == [(16 * turn, 4) for turn in range(6)]


def test_an_idle_gap_ends_at_the_next_arrival():
    stub = Stub()
    step_by_step([Ask(8, 2), Ask(8, 2, arrives=10), Ask(8, 2, arrives=11), Ask(8, 2, arrives=50)], stub)
    assert stub.admitted == [(0, 1), (10, 1), (11, 1), (50, 1)]


def test_asks_that_arrive_together_are_one_batch():
    stub = Stub()
    step_by_step([Ask(8, 3)] * 5, stub)
    assert stub.admitted == [(0, 5)]
    assert stub.clock == 3


def test_a_call_takes_what_arrived_during_the_one_before():
    batches: list[list[int]] = []
    asks = [Ask(8, 10), Ask(8, 2, arrives=4), Ask(8, 3, arrives=10), Ask(8, 2, arrives=14), Ask(8, 2, 90)]
    call_by_call(asks, lambda batch: batches.append([ask.arrives for ask in batch]))
    # The first ends at 10, the second at 13; then nothing is there until 14.
    assert batches == [[0], [4, 10], [14], [90]]
