from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from twinkle_serve.control.log import CommandLog

GAP_S = 100.0


def log_of(*seq_ids: int, now: float = 0.0) -> CommandLog[str]:
    log: CommandLog[str] = CommandLog(GAP_S)
    for seq_id in seq_ids:
        assert log.append(seq_id, f"r{seq_id}", f"c{seq_id}", now) is None
    return log


def ready(log: CommandLog[str]) -> list[int]:
    return [entry.seq_id for entry in log.ready]


@given(st.permutations(range(1, 9)))
def test_any_order_of_arrival_gives_the_order_of_seq_ids(order):
    assert ready(log_of(*order)) == list(range(1, 9))


def test_the_first_chunk_may_come_last():
    log = log_of(2, 3)
    assert ready(log) == []
    assert log.missing == 1
    log.append(1, "r1", "c1", 1.0)
    assert ready(log) == [1, 2, 3]
    assert log.missing is None


def test_an_entry_carries_its_command_and_promise():
    (entry,) = log_of(1).ready
    assert (entry.seq_id, entry.request_id, entry.command) == (1, "r1", "c1")


def test_a_duplicate_is_recognised_parked_ready_and_taken():
    log = log_of(1, 3)
    log.ready.popleft()
    assert [log.original(n) for n in (1, 2, 3)] == ["r1", None, "r3"]


def test_without_a_seq_id_a_request_comes_after_all_others():
    log = log_of(1, 3)
    assert log.original(None) is None
    log.append(None, "last", "last", 0.0)
    log.append(2, "r2", "c2", 0.0)
    assert [entry.request_id for entry in log.ready] == ["r1", "r2", "r3", "last"]


def test_a_number_that_a_request_without_one_took_is_too_late_even_while_that_waits():
    log = log_of(1, 3)
    log.append(None, "mine", "mine", 0.0)
    failure = log.append(4, "r4", "c4", 0.0)
    assert failure is not None
    assert "seq_id 4 comes too late" in failure.message
    log.append(2, "r2", "c2", 0.0)
    assert [entry.request_id for entry in log.ready] == ["r1", "r2", "r3", "mine"]


def test_a_prepended_command_is_first():
    log: CommandLog[str] = CommandLog(GAP_S)
    log.prepend("birth", "create")
    log.append(1, "r1", "c1", 0.0)
    assert [(entry.seq_id, entry.request_id) for entry in log.ready] == [(0, "birth"), (1, "r1")]


def test_a_hole_fails_its_successors_in_order_and_names_the_missing_number():
    log = log_of(1, 4, 3)
    assert log.expire(GAP_S - 0.01) == []
    failed = log.expire(GAP_S)
    assert [request_id for request_id, _ in failed] == ["r3", "r4"]
    for (_, failure), seq_id in zip(failed, (3, 4), strict=True):
        assert f"seq_id {seq_id} was not run" in failure.message
        assert failure.message.startswith("seq_id 2 did not arrive within 100 s")
        assert failure.category == "user"
    assert ready(log) == [1]
    assert log.deadline is None


def test_what_comes_after_the_gap_was_given_up_fails_too_and_the_log_goes_on():
    log = log_of(1, 3)
    log.expire(GAP_S)
    failure = log.append(2, "late", "late", GAP_S)
    assert failure is not None
    assert "seq_id 2 comes too late" in failure.message
    assert log.original(2) == "late"
    assert log.append(4, "r4", "c4", GAP_S) is None
    assert ready(log) == [1, 4]


def test_the_gap_clock_starts_with_the_first_request_that_has_to_wait():
    log = log_of(1, now=0.0)
    assert log.deadline is None
    log.append(3, "r3", "c3", 50.0)
    log.append(4, "r4", "c4", 90.0)
    assert log.deadline == 150.0


def test_the_gap_clock_starts_anew_with_a_new_gap():
    log = log_of(3, 5)
    log.append(1, "r1", "c1", 60.0)
    log.append(2, "r2", "c2", 90.0)
    assert log.missing == 4
    assert log.deadline == 190.0


def test_a_forgotten_number_is_late_if_it_comes_again():
    log = log_of(1)
    log.ready.popleft()
    log.forget(1)
    assert log.original(1) is None
    assert log.append(1, "again", "c1", 0.0) is not None


@pytest.mark.parametrize("seq_id", [0, -3])
def test_numbers_below_one_are_late(seq_id):
    assert log_of().append(seq_id, "r", "c", 0.0) is not None


def test_a_log_without_a_past_starts_with_what_comes_first():
    log: CommandLog[str] = CommandLog(GAP_S, None)
    assert log.append(17, "r17", "c17", 0.0) is None
    assert log.append(18, "r18", "c18", 0.0) is None
    assert log.append(16, "r16", "c16", 0.0) is not None
    assert ready(log) == [17, 18]


class LogMachine(RuleBasedStateMachine):
    """Any arrivals, duplicates, losses and waits: each request meets exactly one fate, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.log: CommandLog[int] = CommandLog(GAP_S)
        self.now = 0.0
        self.sent: dict[int, str] = {}
        self.executed: list[int] = []
        self.failed: list[int] = []
        self.skipped: set[int] = set()

    @rule(seq_id=st.integers(1, 20))
    def deliver(self, seq_id: int) -> None:
        assert self.log.original(seq_id) == self.sent.get(seq_id)
        if seq_id in self.sent:
            return
        self.sent[seq_id] = f"r{seq_id}"
        failure = self.log.append(seq_id, f"r{seq_id}", seq_id, self.now)
        assert (failure is not None) == (seq_id in self.skipped)
        if failure is not None:
            self.failed.append(seq_id)

    @rule()
    def execute(self) -> None:
        while self.log.ready:
            entry = self.log.ready.popleft()
            assert self.sent[entry.seq_id] == entry.request_id
            self.executed.append(entry.seq_id)

    @rule(seconds=st.sampled_from([1.0, 60.0, 100.0]))
    def wait(self, seconds: float) -> None:
        self.now += seconds
        due = self.log.deadline is not None and self.now >= self.log.deadline
        failed = [int(request_id[1:]) for request_id, _ in self.log.expire(self.now)]
        assert bool(failed) == due
        assert failed == sorted(failed)
        self.failed += failed
        if failed:
            self.skipped = set(range(1, max(failed) + 1)) - self.sent.keys()

    @invariant()
    def order_holds(self) -> None:
        assert self.executed == sorted(set(self.executed))

    @invariant()
    def each_request_has_one_fate(self) -> None:
        ready = [entry.seq_id for entry in self.log.ready]
        settled = [*self.executed, *self.failed, *ready]
        assert len(settled) == len(set(settled))
        waiting = self.sent.keys() - set(settled)
        assert bool(waiting) == (self.log.missing is not None) == (self.log.deadline is not None)
        for seq_id in waiting:
            assert self.log.missing not in self.sent
            assert seq_id > self.log.missing

    @invariant()
    def nothing_ready_is_held_back(self) -> None:
        gone = set(self.executed) | set(self.failed) | self.skipped | {e.seq_id for e in self.log.ready}
        first_unknown = next(n for n in range(1, 30) if n not in gone)
        assert self.log.missing in (None, first_unknown)
        assert first_unknown not in self.sent or self.log.missing == first_unknown


LogMachine.TestCase.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
TestLogMachine = LogMachine.TestCase
