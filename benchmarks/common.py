"""What every benchmark shares: interleaved arms, medians of wall and CPU time, and a record of the machine.

Knows how to time callables fairly on a shared machine. Does not know what they do.
"""

from __future__ import annotations

import itertools
import json
import os
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True, slots=True)
class Timing:
    """Median seconds of one arm: by the clock, and of CPU time of this process."""

    wall: float
    cpu: float


Timings = Mapping[str, Timing]
"""By the names of the arms."""


def interleave(
    arms: Mapping[str, Callable[[], object]],
    rounds: int,
    warmup: int = 1,
    settle: bool = False,
    seconds: float = 0.0,
) -> dict[str, Timing]:
    """Run all arms ``rounds`` times in turn, there and back, so that a busy moment of the machine hits each
    alike and none always follows the same other one.

    seconds: go on for that long where the arms are short, whose times vary most.
    settle: each runs once before it is timed. It then finds caches and allocator as it leaves them itself,
    not as the arm before it did.
    """
    samples: dict[str, list[tuple[float, float]]] = {name: [] for name in arms}
    there = list(arms.items())
    turns = itertools.count()
    end = time.perf_counter() + seconds
    while (turn := next(turns)) < warmup + rounds or time.perf_counter() < end:
        for name, arm in there if turn % 2 == 0 else there[::-1]:
            if settle:
                arm()
            wall, cpu = time.perf_counter(), time.process_time()
            arm()
            if turn >= warmup:
                samples[name].append((time.perf_counter() - wall, time.process_time() - cpu))
    return {
        name: Timing(statistics.median(w for w, _ in times), statistics.median(c for _, c in times))
        for name, times in samples.items()
    }


class Report:
    """Rows of one benchmark: printed as they come, written to ``results/<date>-<name>.json`` at the end."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._rows: list[dict[str, Any]] = []
        print(f"== {name} (load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores)", flush=True)

    def row(
        self,
        what: str,
        ratio: float,
        target: str = "",
        timings: Timings | None = None,
        why: str = "",
    ) -> None:
        """One figure: a ratio measured in this run, beside what it should reach and what it came from. why:
        what stands in the way of the target."""
        row: dict[str, Any] = {"what": what, "ratio": ratio, "target": target, "load": os.getloadavg()[0]}
        row["why"] = why
        row["timings"] = {name: asdict(timing) for name, timing in (timings or {}).items()}
        self._rows.append(row)
        aim = f"  (target {target})" if target else ""
        print(f"{what:<64} {ratio:6.2f}{aim}  {why}".rstrip(), flush=True)

    def write(self) -> Path:
        RESULTS.mkdir(exist_ok=True)
        path = RESULTS / f"{datetime.now(UTC):%Y-%m-%d}-{self._name}.json"
        path.write_text(json.dumps({"benchmark": self._name, "rows": self._rows}, indent=1) + "\n")
        print(f"wrote {path}")
        return path
