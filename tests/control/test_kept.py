"""When a run is written to disk: by steps, by time, and by what it would cost to do things again."""

from __future__ import annotations

import pytest

from twinkle_serve.config import StorageConfig
from twinkle_serve.control.kept import UNBORN, Kept, due
from twinkle_serve.control.log import CommandLog
from twinkle_serve.control.runs import Run
from twinkle_serve.protocol.data import LoraSpec
from twinkle_serve.protocol.work import Failure
from twinkle_serve.storage.journal_rows import StoredSnapshot
from twinkle_serve.storage.records import RunRecord

CONFIG = StorageConfig(snapshot_every_steps=50, snapshot_every_s=60.0, snapshot_replay_s=10.0)
NOW = 1000.0


def kept(run_id: str = "run", debt_s: float = 0.0, **fields) -> Kept:
    record = RunRecord(run_id, "session", 0, "tenant", "base", LoraSpec(8), 0.0, 0.0, {})
    run = Run(record, CommandLog(60.0))
    return Kept(run, done=[0, 1, 2], dirty_since=NOW - 1, debt_s=debt_s, **fields)


def test_a_new_run_has_everything_to_redo():
    assert kept().covered == UNBORN
    assert kept().to_redo == [0, 1, 2]


def test_a_snapshot_covers_what_was_done_before_it():
    half = kept(snapshots=[StoredSnapshot("run", 1, "file", 1, 0.0)])
    assert (half.covered, half.executed, half.to_redo) == (1, 2, [2])


def test_nothing_is_due_at_once():
    assert due([kept()], CONFIG, NOW) == []


@pytest.mark.parametrize("why", [{"num_steps": 50}, {"is_urgent": True}, {"debt_s": 10.0}])
def test_steps_urgency_and_cost_make_a_run_due(why):
    assert due([kept(**why)], CONFIG, NOW) == ["run"]


def test_time_makes_a_run_due():
    assert due([kept()], CONFIG, NOW + 59) == ["run"]


@pytest.mark.parametrize(
    "obstacle",
    [
        {"is_persisting": True},
        {"is_restoring": True},
        {"not_before": NOW + 1},
        {"snapshots": [StoredSnapshot("run", 2, "file", 1, 0.0)]},
    ],
)
def test_what_cannot_be_snapshotted_is_not_due(obstacle):
    assert due([kept(is_urgent=True, debt_s=99.0, **obstacle)], CONFIG, NOW) == []


def test_a_run_without_an_adapter_is_not_due():
    down = kept(is_urgent=True)
    down.run.down = Failure("gone")
    assert due([down], CONFIG, NOW) == []


def test_many_small_debts_are_paid_by_the_largest_debtor():
    runs = [kept("a", 3.0), kept("b", 4.0), kept("c", 2.9)]
    assert due(runs, CONFIG, NOW) == []
    runs[2].debt_s = 3.0
    assert due(runs, CONFIG, NOW) == ["b"]
    runs[1].begin_snapshot()
    assert due(runs, CONFIG, NOW) == []


def test_a_snapshot_that_holds_up_the_group_must_be_worth_it():
    slow = kept(debt_s=12.0, hold_s=0.5)
    assert due([slow], CONFIG, NOW) == []
    slow.debt_s = 26.0
    assert due([slow], CONFIG, NOW) == ["run"]


def test_what_is_due_for_two_reasons_is_due_once():
    assert due([kept(debt_s=20.0, is_urgent=True)], CONFIG, NOW) == ["run"]


def test_a_snapshot_begins_with_a_clean_slate():
    run = kept(debt_s=20.0, is_urgent=True, num_steps=9)
    run.begin_snapshot()
    assert (run.debt_s, run.is_urgent, run.num_steps, run.dirty_since) == (0.0, False, 0, None)
    assert run.is_persisting
