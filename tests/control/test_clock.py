from __future__ import annotations

import asyncio
import time

from twinkle_serve.control.clock import SystemClock


async def test_the_system_clock_tells_posix_time_and_calls_back():
    clock = SystemClock()
    assert abs(clock.now() - time.time()) < 60
    called = asyncio.Event()
    clock.call_later(0.0, called.set)
    clock.call_later(0.0, lambda: called.set()).cancel()
    await called.wait()
    before = clock.now()
    assert clock.now() >= before
