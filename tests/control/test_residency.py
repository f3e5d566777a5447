from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from twinkle_serve.control.residency import Residency
from twinkle_serve.protocol.work import DropRun, PageIn, PageOut

RUNS = st.sampled_from([f"r{n}" for n in range(8)])


def test_new_runs_fill_the_slots_without_moves():
    placement = Residency(2).place(["a", "b"])
    assert placement.slots == {"a": 0, "b": 1}
    assert placement.page_out == placement.page_in == ()


def test_the_least_recently_used_run_makes_room():
    residency = Residency(2)
    residency.place(["a", "b"])
    residency.place(["a"])
    placement = residency.place(["c"])
    assert placement.page_out == (PageOut(1, "b"),)
    assert placement.slots == {"c": 1}


def test_a_paged_run_comes_back_perhaps_elsewhere():
    residency = Residency(2)
    residency.place(["a", "b"])
    residency.place(["c"])
    placement = residency.place(["b", "a"])
    assert placement.page_out == (PageOut(0, "c"),)
    assert placement.page_in == (PageIn(0, "a"),)
    assert placement.slots == {"b": 1, "a": 0}
    assert (residency.num_resident, residency.num_paged) == (2, 1)


def test_what_the_tick_needs_is_not_evicted_however_old():
    residency = Residency(2)
    residency.place(["old"])
    residency.place(["young"])
    placement = residency.place(["new", "old"])
    assert placement.page_out == (PageOut(1, "young"),)


def test_a_dropped_slot_is_free_at_once_and_a_dropped_copy_is_told():
    residency = Residency(1)
    residency.place(["a"])
    residency.place(["b"])
    assert residency.drop("a") == DropRun("a", None)
    assert residency.drop("b") == DropRun("b", 0)
    assert residency.drop("b") is None
    assert residency.place(["c"]).page_out == ()


def test_losing_all_leaves_empty_slots():
    residency = Residency(2)
    residency.place(["a", "b"])
    residency.place(["c"])
    assert sorted(residency.lose_all()) == ["a", "b", "c"]
    assert residency.place(["a"]).page_in == ()


class ResidencyMachine(RuleBasedStateMachine):
    """Replay every move on plain slots: a run is in one place, and comes back from where it was put."""

    def __init__(self) -> None:
        super().__init__()
        self.residency = Residency(3)
        self.slots: list[str | None] = [None] * 3
        self.paged: set[str] = set()
        self.used: list[str] = []

    @rule(runs=st.lists(RUNS, unique=True, max_size=3))
    def place(self, runs: list[str]) -> None:
        placement = self.residency.place(runs)
        for out in placement.page_out:
            assert self.slots[out.slot] == out.run_id
            assert out.run_id not in runs
            kept = [r for r in self.slots if r is not None and r not in runs and r != out.run_id]
            outs = [o.run_id for o in placement.page_out]
            assert all(self.used.index(out.run_id) < self.used.index(r) for r in kept if r not in outs)
            self.slots[out.slot] = None
            self.paged.add(out.run_id)
        for page_in in placement.page_in:
            assert self.slots[page_in.slot] is None
            self.paged.remove(page_in.run_id)
            self.slots[page_in.slot] = page_in.run_id
        assert list(placement.slots) == runs
        for run_id, slot in placement.slots.items():
            assert self.slots[slot] in (None, run_id)
            assert run_id not in self.paged
            self.slots[slot] = run_id
            self.used = [*(r for r in self.used if r != run_id), run_id]

    @rule(run_id=RUNS)
    def drop(self, run_id: str) -> None:
        drop = self.residency.drop(run_id)
        if run_id in self.slots:
            slot = self.slots.index(run_id)
            assert drop == DropRun(run_id, slot)
            self.slots[slot] = None
        elif run_id in self.paged:
            assert drop == DropRun(run_id, None)
            self.paged.remove(run_id)
        else:
            assert drop is None

    @invariant()
    def counts_agree(self) -> None:
        assert self.residency.num_resident == sum(run_id is not None for run_id in self.slots)
        assert self.residency.num_paged == len(self.paged)


ResidencyMachine.TestCase.settings = settings(max_examples=150, stateful_step_count=30, deadline=None)
TestResidencyMachine = ResidencyMachine.TestCase
