from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from twinkle_serve.control.backend import SAMPLING_ID_PREFIX, TRAINING_ID_PREFIX
from twinkle_serve.control.promises import PromiseTable
from twinkle_serve.protocol.work import Failure

FAILURE = Failure("no")


@pytest.fixture
def table() -> PromiseTable:
    return PromiseTable(retention_s=100.0)


def test_a_promise_is_pending_until_it_has_a_value(table):
    request_id = table.open("alice", None)
    assert table.look("alice", request_id).state == "pending"
    assert table.num_pending == 1
    table.resolve(request_id, {"x": 1}, now=0.0)
    poll = table.look("alice", request_id)
    assert (poll.state, poll.value, poll.failure) == ("done", {"x": 1}, None)
    assert table.num_pending == 0


def test_a_failure_is_an_answer(table):
    request_id = table.open("alice", None)
    table.fail(request_id, FAILURE, now=0.0)
    assert table.look("alice", request_id).failure == FAILURE


def test_the_first_answer_stands(table):
    request_id = table.open("alice", None)
    table.fail(request_id, FAILURE, now=0.0)
    table.resolve(request_id, 1, now=1.0)
    table.lose(request_id, now=2.0)
    assert table.look("alice", request_id).failure == FAILURE
    assert table.sweep(100.0) == [None]
    assert table.sweep(200.0) == []


def test_another_tenant_sees_nothing(table):
    request_id = table.open("alice", None)
    assert table.look("bob", request_id).state == "gone"
    table.resolve(request_id, 1, now=0.0)
    assert table.look("bob", request_id).state == "gone"


def test_ids_cannot_be_guessed_and_say_what_they_are_for(table):
    training, sampling = table.open("alice", None), table.open("alice", None, sampling=True)
    assert training.startswith(TRAINING_ID_PREFIX)
    assert sampling.startswith(SAMPLING_ID_PREFIX)
    assert len({table.open("alice", None) for _ in range(1000)}) == 1000
    assert len(training) >= len(TRAINING_ID_PREFIX) + 22  # 128 bits in base 64


def test_waiters_are_woken_once_all_of_them(table):
    request_id = table.open("alice", None)
    woken = []
    for name in "abc":
        table.subscribe(request_id, lambda name=name: woken.append(name))
    table.resolve(request_id, 1, now=0.0)
    table.resolve(request_id, 2, now=0.0)
    assert woken == ["a", "b", "c"]


def test_a_waiter_that_left_is_not_woken(table):
    request_id = table.open("alice", None)
    woken = []
    leave = table.subscribe(request_id, lambda: woken.append(1))
    leave()
    leave()
    table.resolve(request_id, 1, now=0.0)
    assert woken == []


def test_a_lost_promise_is_gone_and_its_waiters_know(table):
    request_id = table.open("alice", None, sampling=True)
    woken = []
    table.subscribe(request_id, lambda: woken.append(1))
    table.lose(request_id, now=0.0)
    assert woken == [1]
    assert table.look("alice", request_id).state == "gone"
    assert table.num_pending == 0
    table.resolve(request_id, 1, now=0.0)
    assert table.look("alice", request_id).state == "gone"


def test_what_was_lost_is_forgotten_as_late_as_a_result(table):
    request_id = table.open("alice", "origin", sampling=True)
    table.lose(request_id, now=10.0)
    assert table.sweep(109.9) == []
    assert table.sweep(110.0) == ["origin"]
    assert table.sweep(1000.0) == []


def test_what_was_lost_may_come_back():
    table = PromiseTable(retention_s=100.0, max_bytes=2000)
    request_id = table.open("alice", "origin")
    table.lose(request_id, now=0.0)
    table.reopen(request_id, "alice", "origin")
    assert table.sweep(1000.0) == []
    table.resolve(request_id, 1, now=1000.0)
    assert not table.is_full("alice")
    assert table.look("alice", request_id).value == 1
    assert table.sweep(1100.0) == ["origin"]


def test_failures_take_room_and_promises_that_were_lost_too():
    table = PromiseTable(retention_s=100.0, max_bytes=4500)
    table.fail(table.open("alice", None), Failure("x" * 1000), now=0.0)
    table.fail(table.open("alice", None), Failure("x" * 1000), now=0.0)
    assert not table.is_full("alice")
    table.lose(table.open("alice", None), now=0.0)
    assert table.is_full("alice")
    assert not table.is_full("bob")


def test_samples_that_nobody_fetches_make_room_where_training_results_stay():
    table = PromiseTable(retention_s=100.0, max_bytes=10_000)
    training, sample = table.open("alice", "run"), table.open("alice", "sample", sampling=True)
    table.resolve(training, 1, now=0.0, num_bytes=9000)
    table.resolve(sample, 1, now=1.0, num_bytes=500)
    assert table.sweep(2.0) == ["sample"]
    assert table.take_dropped() == [sample]
    assert table.look("alice", sample).state == "gone"
    assert table.look("alice", training).value == 1


def test_results_are_kept_for_the_retention_from_settling_on(table):
    early, late = table.open("alice", "early"), table.open("alice", "late")
    table.resolve(early, 1, now=0.0)
    table.resolve(late, 2, now=60.0)
    assert table.sweep(99.9) == []
    assert table.sweep(100.0) == ["early"]
    assert table.look("alice", early).state == "gone"
    assert table.look("alice", late).value == 2
    assert len(table) == 1


def test_a_pending_promise_outlives_any_retention(table):
    request_id = table.open("alice", None)
    assert table.sweep(1e9) == []
    assert table.look("alice", request_id).state == "pending"


def test_fail_all_leaves_nothing_pending(table):
    ids = [table.open("alice", None) for _ in range(3)]
    table.resolve(ids[0], 1, now=0.0)
    table.fail_all(FAILURE, now=0.0)
    assert table.look("alice", ids[0]).value == 1
    assert [table.look("alice", i).failure for i in ids[1:]] == [FAILURE, FAILURE]
    assert table.num_pending == 0


class PromiseMachine(RuleBasedStateMachine):
    """Settled exactly once, kept for its time, each waiter woken exactly once."""

    def __init__(self) -> None:
        super().__init__()
        self.table = PromiseTable(retention_s=10.0)
        self.now = 0.0
        self.answers: dict[str, tuple[float, object] | None] = {}
        self.waiting: dict[str, int] = {}
        self.woken: dict[str, int] = {}

    @rule()
    def open(self) -> None:
        self.answers[self.table.open("t", None)] = None

    @rule(pick=st.integers(0, 9), value=st.integers(), failing=st.booleans())
    def settle(self, pick: int, value: int, failing: bool) -> None:
        for request_id in list(self.answers)[pick : pick + 1]:
            if failing:
                self.table.fail(request_id, Failure(str(value)), self.now)
            else:
                self.table.resolve(request_id, value, self.now)
            if self.answers[request_id] is None:
                self.answers[request_id] = (self.now, Failure(str(value)) if failing else value)

    @rule(pick=st.integers(0, 9))
    def wait_for(self, pick: int) -> None:
        for request_id in list(self.answers)[pick : pick + 1]:
            if self.answers[request_id] is None:
                self.waiting[request_id] = self.waiting.get(request_id, 0) + 1
                self.table.subscribe(request_id, lambda r=request_id: self._wake(r))

    def _wake(self, request_id: str) -> None:
        self.woken[request_id] = self.woken.get(request_id, 0) + 1

    @rule(seconds=st.sampled_from([1.0, 5.0, 10.0]))
    def sweep(self, seconds: float) -> None:
        self.now += seconds
        self.table.sweep(self.now)

    @invariant()
    def looks_right(self) -> None:
        for request_id, answer in self.answers.items():
            poll = self.table.look("t", request_id)
            if answer is None:
                assert poll.state == "pending"
                assert request_id not in self.woken
                continue
            settled_at, value = answer
            assert self.woken.get(request_id, 0) == self.waiting.get(request_id, 0)
            if poll.state == "gone":
                assert settled_at + 10.0 <= self.now
            else:
                assert value == (poll.failure if poll.failure is not None else poll.value)


PromiseMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
TestPromiseMachine = PromiseMachine.TestCase
