"""Places at which a test stops a process, to end it or another one right there.

``TWINKLE_FAULTS`` names a directory; a file in it that is named like a place is a trap. The first process
that comes by takes the trap, says so by a file ``place.pid``, and stands still until that is removed. Without
the variable a place costs one comparison. Knows no place, and not who dies there (tests/faults).
"""

from __future__ import annotations

import os
import time
from pathlib import Path

TRAPS = os.environ.get("TWINKLE_FAULTS")
_PATIENCE_S = 60.0


def reach(place: str) -> None:
    """This process is at ``place`` now."""
    if TRAPS is not None:
        _look(Path(TRAPS), place)


def _look(traps: Path, place: str) -> None:
    taken = traps / f"{place}.{os.getpid()}"
    try:
        os.rename(traps / place, taken)
    except FileNotFoundError:
        return
    deadline = time.monotonic() + _PATIENCE_S
    while taken.exists() and time.monotonic() < deadline:
        time.sleep(0.005)
