"""Signals that come while Ray starts: told of at once, followed afterwards."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import ray._private.utils

from twinkle_serve.cluster.private_ray import _signals_held_back


class _Left(BaseException):
    pass


def _leave(number: int, _: Any) -> None:
    raise _Left(number)


class _Told(list[int]):
    """The numbers told of; ``one`` is set by the first."""

    def __init__(self) -> None:
        self.one = threading.Event()

    def __call__(self, number: int) -> None:
        self.append(number)
        self.one.set()


@pytest.fixture(autouse=True)
def _handlers(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Those of a service, and afterwards pytest's and Ray's own."""
    monkeypatch.setattr(ray._private.utils, "set_sigterm_handler", ray._private.utils.set_sigterm_handler)
    before = {number: signal.signal(number, _leave) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def test_a_signal_is_told_of_at_once_and_followed_after_the_block() -> None:
    told, ended = _Told(), []

    def start() -> None:
        with _signals_held_back(told):
            os.kill(os.getpid(), signal.SIGINT)
            assert told.one.wait(60)
            os.kill(os.getpid(), signal.SIGTERM)
            ended.append("in order")

    with pytest.raises(_Left) as left:
        start()
    assert ended
    assert left.value.args == (signal.SIGINT,)
    assert told == [signal.SIGINT, signal.SIGTERM]


def test_a_signal_is_followed_also_when_ray_does_not_start() -> None:
    def start() -> None:
        with _signals_held_back(_Told()):
            os.kill(os.getpid(), signal.SIGTERM)
            raise RuntimeError("no Ray")

    with pytest.raises(_Left):
        start()


def test_without_a_signal_all_is_as_before() -> None:
    told, num_threads = _Told(), threading.active_count()
    with _signals_held_back(told):
        pass
    with pytest.raises(RuntimeError, match="no Ray"), _signals_held_back(told):
        raise RuntimeError("no Ray")
    assert told == []
    assert threading.active_count() == num_threads
    assert signal.getsignal(signal.SIGTERM) is _leave
    assert signal.set_wakeup_fd(-1) == -1
