"""How benchmarks time and count: arms in turn within a time budget, quantiles, CPU of process trees,
fairness.

Knows clocks, /proc and arithmetic. Does not know what an arm does.
"""

from __future__ import annotations

import os
import signal
import statistics
import subprocess
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

Found = TypeVar("Found")
_TICKS_PER_S = os.sysconf("SC_CLK_TCK")
# The parts of our server, by a word in the name of their processes.
_KINDS = {
    "ServeReplica": "replicas",
    "ProxyActor": "proxy",
    "haproxy": "proxy",
    "Coordinator": "coordinator",
    "RankWorker": "rank",
}


@dataclass(frozen=True, slots=True)
class Budget:
    """Time that a part may take. ``quick``: only show that it works."""

    seconds: float
    quick: bool
    began: float

    @classmethod
    def of(cls, seconds: float, quick: bool) -> Budget:
        return cls(seconds, quick, time.monotonic())

    @property
    def left_s(self) -> float:
        return self.began + self.seconds - time.monotonic()

    def share(self, part: float) -> float:
        """Seconds: this part of the whole budget, but no more than is left."""
        return max(0.0, min(part * self.seconds, self.left_s))


def quantile(values: Iterable[float], q: float) -> float:
    """Linear between neighbours. Raises ValueError without values or with q outside 0..1."""
    ordered = sorted(values)
    if not ordered or not 0 <= q <= 1:
        raise ValueError("a quantile needs values, and q between 0 and 1")
    place = (len(ordered) - 1) * q
    below = int(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (place - below)


def jain(shares: Sequence[float]) -> float:
    """Jain's fairness index: 1 if all are equal, 1/n if one has everything. Raises ValueError without
    shares."""
    squares = sum(share * share for share in shares)
    if not squares:
        raise ValueError("fairness needs somebody who got something")
    return sum(shares) ** 2 / (len(shares) * squares)


def worst_deviation(got: Sequence[float], due: Sequence[float]) -> float:
    """Largest relative distance of a share in what was got from the share that was due; 0.1 is 10 %."""
    all_got, all_due = sum(got), sum(due)
    return max(abs((g / all_got) / (d / all_due) - 1) for g, d in zip(got, due, strict=True))


def in_turn(
    arms: Mapping[str, Callable[[], Found]],
    *,
    rounds: int,
    seconds: float,
    min_rounds: int = 3,
    warmup: int = 1,
) -> dict[str, list[Found]]:
    """What each arm returned in each round. All arms run in every round, so that a busy moment of the machine
    hits them alike, and every second round backwards, so that none always follows the same other one. Ends
    after ``rounds``, or after ``seconds`` once there were ``min_rounds``."""
    found: dict[str, list[Found]] = {name: [] for name in arms}
    until = time.monotonic() + seconds
    for turn in range(-warmup, rounds):
        if turn >= min_rounds and time.monotonic() > until:
            break
        order = list(arms) if turn % 2 == 0 else list(reversed(arms))
        for name in order:
            value = arms[name]()
            if turn >= 0:
                found[name].append(value)
    return found


def ratio(above: Sequence[float], below: Sequence[float]) -> float:
    """Of the medians."""
    return statistics.median(above) / statistics.median(below)


def typical(found: Sequence[Mapping[str, Any]], key: str) -> dict[str, float]:
    """The median of each part of a mapping that all rounds have."""
    return {part: statistics.median(each[key][part] for each in found) for part in found[0][key]}


def in_ms(seconds: Mapping[str, float]) -> str:
    """ "rank 12, proxy 3 ms": the largest first, what rounds to nothing left out."""
    parts = sorted(((1000 * used, name.partition(" s/")[0]) for name, used in seconds.items()), reverse=True)
    return ", ".join(f"{name} {used:.0f}" for used, name in parts if used >= 0.5) + " ms"


def tree_of(pid: int) -> set[int]:
    """``pid`` and all processes below it."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            stat = _stat(int(entry.name))
            if stat is not None:
                children.setdefault(int(stat[1]), []).append(int(entry.name))
    found, queue = {pid}, [pid]
    while queue:
        below = children.get(queue.pop(), [])
        found.update(below)
        queue += below
    return found


def cpu_of(pids: Iterable[int]) -> dict[int, float]:
    """CPU seconds, user and system, that each living process has used so far."""
    used = {}
    for pid in pids:
        stat = _stat(pid)
        if stat is not None:
            used[pid] = (int(stat[11]) + int(stat[12])) / _TICKS_PER_S
    return used


def name_of(pid: int) -> str:
    """What a process is: Ray's title of an actor, or the first words of its command line."""
    try:
        line = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace")
    except OSError:
        return "gone"
    if line.startswith("ray::"):
        return line.replace("\0", " ").strip()
    if "default_worker.py" in line:
        return "ray worker"
    return Path(line.split("\0")[0]).name


def end_tree(process: subprocess.Popen[bytes]) -> None:
    """Kill the process and all that it started; some leave children behind when they are asked to stop."""
    for pid in tree_of(process.pid):
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
    process.wait()


class TreeClock:
    """CPU seconds of a server: the process ``pid`` and all below it, as they are when this is made."""

    def __init__(self, pid: int) -> None:
        self._pids = tree_of(pid)

    @property
    def pids(self) -> set[int]:
        return self._pids

    def seconds(self) -> float:
        """All together, so far."""
        return sum(cpu_of(self._pids).values())

    def by_name(self) -> dict[str, float]:
        """So far, by what the process is."""
        sums: dict[str, float] = {}
        for pid, used in cpu_of(self._pids).items():
            name = name_of(pid)
            sums[name] = sums.get(name, 0.0) + used
        return sums

    def by_part(self) -> dict[str, float]:
        """So far, by what the process is for; Ray's own processes and ours that are small are "others"."""
        sums = dict.fromkeys([*dict.fromkeys(_KINDS.values()), "others"], 0.0)
        for name, used in self.by_name().items():
            sums[next((kind for word, kind in _KINDS.items() if word in name), "others")] += used
        return sums

    def since(self, before: Mapping[str, float], steps: int) -> dict[str, float]:
        """CPU seconds of each part for one of ``steps`` since ``by_part`` said ``before``."""
        return {part: (now - before[part]) / steps for part, now in self.by_part().items()}


def _stat(pid: int) -> list[str] | None:
    """The fields after the name, which may hold anything: state, parent, ..."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
