"""Memory of a rank's process as gauges."""

from __future__ import annotations

import os

import pytest

from twinkle_serve.cluster.rank_memory import RankMemory, memory_of_this_process
from twinkle_serve.control.metrics import Tally


def test_resident_memory_is_that_of_this_process() -> None:
    before = memory_of_this_process()["host"]
    block = bytearray(os.urandom(1)) * (64 * 2**20)
    after = memory_of_this_process()["host"]
    assert 60 * 2**20 <= after - before <= 100 * 2**20
    assert len(block) == 64 * 2**20


def test_it_is_reported_with_model_and_rank_but_not_at_every_call(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr("twinkle_serve.cluster.rank_memory.time.monotonic", lambda: now)
    tally = Tally()
    memory = RankMemory(tally, "base", 3)
    memory.report()
    key = ("rank_memory_bytes", (("kind", "host"), ("model", "base"), ("rank", "3")))
    assert tally.values.pop(key) > 2**20
    now = 102.0
    memory.report()
    assert key not in tally.values
    now = 105.1
    memory.report()
    assert key in tally.values
