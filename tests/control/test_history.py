"""Curves of a run: what a step's point holds, what happens when it is done again, and bounds."""

from __future__ import annotations

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from twinkle_serve.control.history import MAX_NAMES, MAX_PASSES, Curves, Histories, RunHistory, means


def trained(*losses: float) -> RunHistory:
    """One pass of 10 tokens and one step each; passes have odd seq_ids, steps even ones."""
    history = RunHistory()
    for number, loss in enumerate(losses):
        history.add_pass(2 * number + 1, {"loss:sum": loss * 5, "weight:sum": 5.0}, 10, True)
        history.add_step(2 * number + 2, 100.0 + number, 1e-4, {})
    return history


def test_a_point_holds_the_means_of_the_passes_since_the_last_step() -> None:
    history = RunHistory()
    history.add_pass(1, {"loss:sum": 6.0, "weight:sum": 2.0}, 8, True)
    history.add_pass(2, {"loss:sum": 2.0, "weight:sum": 2.0}, 4, True)
    history.add_pass(3, {"loss:sum": 9.0, "weight:sum": 3.0}, 5, False)
    history.add_step(4, 50.0, 1e-3, {"grad_norm:mean": 0.5})
    steps = history.view()["steps"]
    assert steps["loss"] == [2.0]  # (6 + 2) / (2 + 2)
    assert steps["forward_loss"] == [3.0]
    assert steps["grad_norm"] == [0.5]
    assert steps["learning_rate"] == [1e-3]
    assert steps["tokens"] == [17.0]
    assert steps["step"] == [1.0]


def test_a_loss_that_appears_later_leaves_a_gap_before() -> None:
    history = RunHistory()
    history.add_step(1, 0.0, 1e-3, {})
    history.add_pass(2, {"loss:sum": 1.0, "weight:sum": 1.0}, 1, True)
    history.add_step(3, 1.0, 1e-3, {})
    assert history.view()["steps"]["loss"] == [None, 1.0]


def test_what_recovery_does_again_counts_once() -> None:
    history = trained(3.0, 2.0, 1.0)
    history.add_pass(7, {"loss:sum": 1.0, "weight:sum": 1.0}, 10, True)  # lost before its step
    for number, loss in [(3, 2.5), (5, 1.5), (7, 0.5)]:
        history.add_pass(number, {"loss:sum": loss, "weight:sum": 1.0}, 10, True)
        history.add_step(number + 1, 200.0, 1e-4, {})
    view = history.view()
    assert view["steps"]["loss"] == [3.0, 2.5, 1.5, 0.5]
    assert view["steps"]["step"] == [1.0, 2.0, 3.0, 4.0]
    assert view["num_steps"] == 4
    assert view["total_tokens"] == 40


def test_the_version_changes_with_every_point_and_only_then() -> None:
    history = trained(1.0)
    before = history.version
    assert history.version == before
    history.add_pass(3, {"loss:sum": 1.0}, 1, True)
    assert history.version == before
    history.add_step(4, 0.0, 1e-4, {})
    assert history.version > before
    before = history.version
    history.report(1, 0.0, {"reward": 0.5})
    assert history.version > before
    assert history.view()["reported"]["reward"] == [0.5]


def test_what_is_reported_without_a_step_belongs_to_the_last_one() -> None:
    history = RunHistory()
    history.report(None, 0.0, {"reward": 0.1})
    history = trained(1.0, 1.0, 1.0)
    history.report(None, 0.0, {"reward": 0.5})
    assert history.view()["reported"] == {"step": [3.0], "time": [0.0], "reward": [0.5]}


@pytest.mark.parametrize(
    ("sums", "expected"),
    [
        ({"loss:sum": 6.0, "weight:sum": 3.0, "": 10.0}, {"loss": 2.0}),
        ({"loss:sum": 6.0, "scored_tokens:sum": 2.0, "": 10.0}, {"loss": 3.0}),
        ({"loss:sum": 6.0, "": 12.0}, {"loss": 0.5}),
        ({"loss:sum": 6.0, "weight:sum": 0.0, "": 3.0}, {"loss": 2.0}),
        ({"loss:sum": 6.0, "weight:sum": -4.0, "": 3.0}, {"loss": 2.0}),  # a custom loss's gradient
        ({"": 0.0}, {}),
    ],
)
def test_means_are_over_the_tokens_that_count(sums: dict[str, float], expected: dict[str, float]) -> None:
    assert means(sums) == expected


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=300))
def test_a_full_ring_loses_resolution_but_neither_ends_nor_tokens(values: list[float]) -> None:
    curves = Curves(most=16)
    for index, value in enumerate(values):
        curves.append({"step": index + 1.0, "tokens": 2.0, "loss": value})
        assert len(curves) < 16
    columns = curves.columns()
    assert columns["step"][-1] == len(values)
    assert sum(columns["tokens"]) == 2 * len(values)
    assert len({len(column) for column in columns.values()}) == 1
    # No point is outside of what went in.
    assert min(values) - 1e-6 <= min(columns["loss"]) <= max(columns["loss"]) <= max(values) + 1e-6


def test_merging_ignores_what_is_not_there() -> None:
    curves = Curves(most=4)
    for point in [{"loss": 1.0}, {"other": 5.0}, {"loss": 2.0}, {"loss": 4.0}]:
        curves.append(point)
    assert curves.columns() == {"loss": [1.0, 3.0], "other": [5.0, None]}


def test_numbers_that_json_has_not_are_none() -> None:
    curves = Curves()
    curves.append({"loss": math.inf})
    curves.append({"loss": math.nan})
    assert curves.columns() == {"loss": [None, None]}


def test_names_are_bounded() -> None:
    curves = Curves()
    curves.append({f"name{i}": 1.0 for i in range(100)})
    assert len(curves.columns()) == MAX_NAMES


def test_the_run_that_was_touched_longest_ago_is_forgotten() -> None:
    histories = Histories(most=2)
    for run in ("a", "b", "a", "c"):
        histories.of(run).report(1, 0.0, {"reward": 1.0})
        histories.changed()
    assert histories.of("a").view()["reported"]["reward"] == [1.0, 1.0]
    assert histories.of("b").view()["reported"] == {}
    assert histories.of("nobody").view()["num_steps"] == 0


def test_what_changed_is_told_once() -> None:
    histories = Histories()
    histories.of("a").report(1, 0.0, {"reward": 1.0})
    histories.of("b")
    assert [run for run, _ in histories.changed()] == ["a"]
    assert histories.changed() == []
    histories.of("a").report(2, 0.0, {"reward": 1.0})
    assert [run for run, _ in histories.changed()] == ["a"]


def test_a_history_goes_on_where_it_was_saved() -> None:
    first = Histories()
    first._runs["run"] = trained(3.0, 2.0)
    first._saved["run"] = 0
    ((_, state),) = first.changed()
    second = Histories()
    second.load = lambda run_id: json.loads(json.dumps(state))
    history = second.of("run")
    assert history.view() == trained(3.0, 2.0).view()
    assert second.changed() == [], "nothing is new"
    # The last step is done again, then a new one.
    for number, loss in [(3, 2.5), (5, 1.0)]:
        history.add_pass(number, {"loss:sum": loss, "weight:sum": 1.0}, 10, True)
        history.add_step(number + 1, 0.0, 1e-4, {})
    assert history.view()["steps"]["loss"] == [3.0, 2.5, 1.0]
    assert history.view()["total_tokens"] == 30


@pytest.mark.parametrize(
    "state",
    [
        {},
        {"steps": 1, "reported": {}},
        {"steps": {"a": [1], "b": [1, 2]}, "reported": {}},
        {"steps": {"a": ["x"]}, "reported": {}},
        {"steps": {"a": [1.0] * 10_000}, "reported": {}},
    ],
)
def test_what_makes_no_sense_is_an_empty_history(state: dict) -> None:
    histories = Histories()
    histories.load = lambda run_id: state
    assert histories.of("run").view()["num_steps"] == 0


def test_passes_without_a_step_take_bounded_room_and_count_in_the_next() -> None:
    history = RunHistory()
    many = 3 * MAX_PASSES
    for seq_id in range(1, many + 1):
        backward = seq_id % 3 == 0
        history.add_pass(seq_id, {"loss:sum": 2.0 if backward else 1.0}, 10, backward)
    assert len(history.passes) == MAX_PASSES
    history.add_step(many + 1, 0.0, 1e-3, {})
    steps = history.view()["steps"]
    assert (steps["tokens"], steps["loss"], steps["forward_loss"]) == ([10.0 * many], [0.2], [0.1])
    assert (history.passes, history.sums) == ({}, None)


def test_the_sums_of_passes_have_no_more_names_than_a_point() -> None:
    history = RunHistory()
    for seq_id in range(1, 2 * MAX_PASSES):
        history.add_pass(seq_id, {f"own{seq_id}:sum": 1.0}, 10, True)
    assert len(history.sums.passes[True].metrics) == MAX_NAMES


@pytest.mark.parametrize("first", [1, 50, MAX_PASSES + 20])
def test_passes_that_are_done_again_count_once_however_far_back_they_lie(first: int) -> None:
    history = RunHistory()
    many = MAX_PASSES + 100
    for start in (1, first):
        for seq_id in range(start, many + 1):
            history.add_pass(seq_id, {"loss:sum": 1.0}, 10, True)
    history.add_step(many + 1, 0.0, 1e-3, {})
    assert history.view()["steps"]["tokens"] == [10.0 * many]


def test_a_step_that_is_done_again_has_nothing_of_what_came_after_it() -> None:
    history = trained(1.0)
    for seq_id in range(3, MAX_PASSES + 100):
        history.add_pass(seq_id, {"loss:sum": 1.0}, 10, True)
    history.add_pass(1, {"loss:sum": 1.0}, 10, True)
    history.add_step(2, 0.0, 1e-3, {})
    assert history.view()["steps"]["tokens"] == [10.0]


def test_what_has_to_go_is_told_before_it_is_forgotten() -> None:
    histories = Histories(most=1)
    histories.of("a").report(1, 0.0, {"reward": 1.0})
    histories.of("b").report(1, 0.0, {"reward": 1.0})
    assert histories.of("a").view()["reported"]["reward"] == [1.0], "it has not been saved yet"
    assert sorted(run for run, _ in histories.changed()) == ["a", "b"]
    assert histories.changed() == []
    assert histories.of("b").view()["reported"] == {}
