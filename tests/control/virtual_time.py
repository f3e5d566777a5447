"""An event loop whose clock jumps to the next timer instead of waiting for it.

Coroutines run as they are, hours pass in milliseconds, and a run with the same seed is the same run. Knows
nothing of what it drives.
"""

from __future__ import annotations

import asyncio
import functools
import selectors
from collections.abc import Callable, Coroutine
from typing import Any

EPOCH = 1_700_000_000.0


class DeadlockError(RuntimeError):
    """Nothing is left that could wake anybody."""


class _JumpingSelector(selectors.DefaultSelector):
    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0

    def select(self, timeout: float | None = None) -> Any:
        if timeout is None:
            raise DeadlockError
        self.now += max(0.0, timeout)
        return []  # nothing comes from outside: no sockets, no threads


class VirtualLoop(asyncio.SelectorEventLoop):
    def __init__(self) -> None:
        self._jumping = _JumpingSelector()
        super().__init__(self._jumping)

    def time(self) -> float:
        return self._jumping.now


class VirtualClock:
    """control.clock.Clock on the virtual loop that runs."""

    def now(self) -> float:
        return EPOCH + asyncio.get_running_loop().time()

    def call_later(self, delay_s: float, callback: Callable[[], object]) -> asyncio.TimerHandle:
        return asyncio.get_running_loop().call_later(delay_s, callback)


def run(coroutine: Coroutine[Any, Any, Any]) -> Any:
    loop = VirtualLoop()
    try:
        return loop.run_until_complete(coroutine)
    finally:
        loop.run_until_complete(loop.shutdown_asyncgens())
        loop.close()


def virtual(test: Callable[..., Coroutine[Any, Any, Any]]) -> Callable[..., Any]:
    """Let a coroutine test run in virtual time."""

    @functools.wraps(test)
    def runner(*args: Any, **kwargs: Any) -> Any:
        return run(test(*args, **kwargs))

    return runner
