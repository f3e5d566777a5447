from __future__ import annotations

from types import SimpleNamespace

import pytest

from benchmarks import side_by_side
from benchmarks.measure import Budget
from benchmarks.peers.environment import Environment, NotStarted
from benchmarks.side_by_side import (
    TOKENS,
    Side,
    compare,
    run_skyrl,
    run_twinkle,
    steady,
    steps_per_s,
    warm_up,
)
from benchmarks.table import Rows


class FakeClients:
    """Steps of known length: ``seconds`` each, and longer while there still is something to compile. The
    first one of a round is answered ``fill`` seconds later than its length."""

    def __init__(self, seconds: float, compiling: int = 0, fill: float = 0.0) -> None:
        self.seconds, self.compiling, self.fill = seconds, compiling, fill
        self.tenants = 0

    def open(self, tenants: int) -> None:
        self.tenants += tenants

    def train(self, tenants, *, tokens: int, depth: int, steps: int):
        assert max(tenants) < self.tenants
        self.compiling -= 1
        wait = self.seconds * (10 if self.compiling >= 0 else 1)
        ends = [self.fill + wait * (number + 1) for number in range(steps)]
        return {"wall": ends[-1], "tenants": [{"step": [wait] * steps, "ends": ends} for _ in tenants]}


def side(seconds: float, compiling: int = 0, fill: float = 0.0, many: int = 4) -> Side:
    """Its server uses ``seconds`` of CPU for each reading of the clock."""
    readings = iter(range(10**6))
    clock = SimpleNamespace(seconds=lambda: next(readings) * seconds)
    return Side(FakeClients(seconds, compiling, fill), clock, 2, many)


@pytest.mark.parametrize(
    ("speeds", "found"),
    [
        ([], False),
        ([9.0, 9.0], False),
        ([1.0, 9.0, 9.0, 8.0], True),
        ([9.0, 9.0, 1.0, 9.0], False),
        ([1.0, 1.1, 9.0], False),
    ],
)
def test_steady_is_three_rounds_near_the_best(speeds, found):
    assert steady(speeds) is found


def test_warming_up_ends_when_nothing_is_compiled_any_more():
    theirs = side(0.5, compiling=2)
    theirs.clients.open(1)
    detail = warm_up(theirs, 1, 0, Budget.of(3600.0, quick=False))
    assert detail == {"rounds to warm up": 5, "steady after them": True}


def test_warming_up_ends_with_its_time():
    theirs = side(0.5, compiling=10**6)
    theirs.clients.open(1)
    detail = warm_up(theirs, 1, 0, Budget.of(0.0, quick=False))
    assert detail == {"rounds to warm up": 0, "steady after them": False}


@pytest.mark.parametrize(
    ("ends", "speed"),
    [
        ([[3.0, 4.0, 5.0]], 1.0),
        ([[3.0, 4.0], [3.0, 4.0]], 2.0),  # a server that does all clients' steps at once
        ([[1.0, 3.0], [2.0, 4.0]], 1.0),  # one that does a step after another, clients in turn
        ([[1.0, 2.0], [3.0, 4.0]], 1.0),  # and one client after another
    ],
)
def test_speed_is_counted_once_every_client_has_had_a_step(ends, speed):
    assert steps_per_s(ends) == speed


@pytest.mark.parametrize("count", [1, 8])
def test_filling_the_pipeline_is_no_part_of_the_speed_however_few_the_steps(count):
    few, many = (side(0.5, fill=2.0, many=steps) for steps in (2, 12))
    for each in (few, many):
        each.clients.open(count)
    speeds = [each.measured(count, each.many, 2)["tokens_per_s"] for each in (few, many)]
    assert speeds == pytest.approx([count * TOKENS / 0.5] * 2)


def test_what_is_measured_before_the_peer_is_steady_reaches_nothing():
    rows = Rows("skyrl")
    sides = {"skyrl": side(0.5, compiling=10**6), "ours": side(0.05)}
    compare(rows, Budget.of(0.0, quick=True), "Peer", sides, compiles=True)
    assert len(rows.found) == 6
    for row in rows.found:
        assert row.value == pytest.approx(10.0 if "CPU" in row.what else 100.0)
        assert row.status == ""
        assert "not steady yet (rounds to warm up: 0)" in row.note


def test_rows_of_a_comparison():
    rows = Rows("skyrl")
    sides = {"skyrl": side(0.5, compiling=3), "ours": side(0.05)}
    compare(rows, Budget.of(3600.0, quick=False), "Peer", sides, compiles=True)
    assert [row.what for row in rows.found] == [
        "Peer: its time for a step over ours, p50, one client, one operation at a time",
        "Peer: its time for a step over ours, p50, one client, both sent, then awaited",
        "tokens/s over Peer's, 1 clients at once",
        "Peer: its server CPU a step over ours, 1 clients at once",
        "tokens/s over Peer's, 4 clients at once",
        "Peer: its server CPU a step over ours, 4 clients at once",
        "tokens/s over Peer's, 8 clients at once",
        "Peer: its server CPU a step over ours, 8 clients at once",
    ]
    assert [row.value for row in rows.found] == pytest.approx([10.0] * 8)
    assert rows.found[0].detail["skyrl p50 s"] == 0.5
    assert rows.found[6].cpu == pytest.approx({"skyrl s/step": 0.5 / 32, "ours s/step": 0.05 / 32})
    assert all(row.detail["steady after them"] for row in rows.found if "CPU" not in row.what)
    assert [row.status for row in rows.found] == ["reached", "reached", "reached", "", "", "", "reached", ""]
    assert not any(row.note for row in rows.found)


@pytest.fixture
def peers(monkeypatch, tmp_path):
    """Two peers of which neither is installed."""
    for peer in (side_by_side.twinkle, side_by_side.skyrl):
        monkeypatch.setattr(peer, "ENVIRONMENT", Environment("peer 1.0", tmp_path / "peer", (), "2 GB"))
    return tmp_path / "peer"


@pytest.mark.parametrize(("run", "recorded"), [(run_twinkle, False), (run_skyrl, True)])
def test_a_peer_that_is_not_installed_is_a_row_that_says_so(run, recorded, peers, tmp_path):
    rows = Rows("peer")
    run(rows, Budget.of(60.0, quick=True), tmp_path)
    (row,) = rows.found
    assert row.status == "skipped"
    assert "make peers" in row.note
    assert ("1,128 tokens/s with one client" in row.note) is recorded


def test_a_peer_that_does_not_start_leaves_the_recorded_figures(peers, monkeypatch, tmp_path):
    def broken(python, model, scratch):
        raise NotStarted("SkyRL did not start:\nno memory")

    monkeypatch.setattr(Environment, "installed", lambda self: self.python)
    monkeypatch.setattr(side_by_side, "_model", lambda python, models: models)
    monkeypatch.setattr(side_by_side.skyrl, "running_skyrl", broken)
    rows = Rows("skyrl")
    with pytest.raises(NotStarted):
        run_skyrl(rows, Budget.of(60.0, quick=True), tmp_path)
    (row,) = rows.found
    assert "1,128 tokens/s with one client" in row.note
