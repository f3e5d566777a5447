"""A place is nothing without a trap, and holds whoever comes by first while there is one."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path

import pytest

from twinkle_serve import faults


@pytest.fixture
def traps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(faults, "TRAPS", str(tmp_path))
    return tmp_path


def test_without_the_variable_a_trap_is_never_looked_for(tmp_path, monkeypatch):
    monkeypatch.setattr(faults, "TRAPS", None)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").touch()
    faults.reach("here")
    assert (tmp_path / "here").exists()


def test_a_place_without_a_trap_is_passed(traps):
    (traps / "there").touch()
    faults.reach("here")
    assert [path.name for path in traps.iterdir()] == ["there"]


def test_the_first_who_comes_stands_still_until_released_and_the_second_passes(traps):
    (traps / "here").touch()
    walker = threading.Thread(target=faults.reach, args=("here",))
    walker.start()
    taken = traps / f"here.{os.getpid()}"
    while not taken.exists():
        time.sleep(0.001)
    faults.reach("here")
    assert walker.is_alive()
    taken.unlink()
    walker.join(10)
    assert not walker.is_alive()


def test_nobody_stands_for_ever(traps, monkeypatch):
    monkeypatch.setattr(faults, "_PATIENCE_S", 0.02)
    (traps / "here").touch()
    faults.reach("here")
    assert (traps / f"here.{os.getpid()}").exists()
