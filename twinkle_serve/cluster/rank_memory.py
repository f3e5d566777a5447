"""The memory of one rank's process, as gauges.

Knows /proc and torch's allocator. Does not know what the memory is used for.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

from twinkle_serve.control.metrics import Meter

_EVERY_S = 5.0


class RankMemory:
    """Call ``report`` as often as convenient; it does something every few seconds."""

    def __init__(self, meter: Meter, model: str, rank: int) -> None:
        self._meter = meter
        self._labels = {"model": model, "rank": str(rank)}
        self._reported_at = float("-inf")

    def report(self) -> None:
        now = time.monotonic()
        if now - self._reported_at < _EVERY_S:
            return
        self._reported_at = now
        for kind, value in memory_of_this_process().items():
            self._meter.set("rank_memory_bytes", value, kind=kind, **self._labels)


def memory_of_this_process() -> dict[str, float]:
    """Bytes: host (resident), and with a GPU device and device_peak."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    found = {"host": float(pages * os.sysconf("SC_PAGE_SIZE"))}
    torch = sys.modules.get("torch")  # a stand-in engine of a test has none
    if torch is not None and torch.cuda.is_available():
        found["device"] = float(torch.cuda.memory_allocated())
        found["device_peak"] = float(torch.cuda.max_memory_allocated())
    return found
