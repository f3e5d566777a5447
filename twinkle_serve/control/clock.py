"""Time as the control plane sees it: a number that never goes back, and calls made later.

Knows POSIX seconds. Does not know who waits for what.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Protocol


class Timer(Protocol):
    """A call that has yet to be made."""

    def cancel(self) -> None: ...


class Clock(Protocol):
    """``now`` in POSIX seconds; ``call_later`` calls back once, unless cancelled first."""

    def now(self) -> float: ...

    def call_later(self, delay_s: float, callback: Callable[[], object]) -> Timer: ...


class SystemClock:
    """Wall time at its making, monotonic from there on; timers of the running event loop."""

    def __init__(self) -> None:
        self._epoch = time.time() - time.monotonic()

    def now(self) -> float:
        return self._epoch + time.monotonic()

    def call_later(self, delay_s: float, callback: Callable[[], object]) -> Timer:
        return asyncio.get_running_loop().call_later(delay_s, callback)
