"""Whether the ranks of a group get on with their tick, and whose fault it is if they do not.

Knows ranks' beats and deadlines. Does not know how ranks are started or ended (group.py). A tick may take as
long as it likes while the slowest rank makes progress; a rank that stands still is named with its stack.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ray.exceptions import RayError

from twinkle_serve.cluster.worker import Beat

_log = logging.getLogger(__name__)
_LOOK_EVERY_S = 1.0
# Where adapters are read and written, the file system sets the pace and nothing beats meanwhile.
_DISK_PHASES = frozenset({"move", "save"})
_DISK_PATIENCE = 10.0


async def until_stalled(
    name: str, deadline_s: float, workers: Sequence[Any], tick_id: int, finished: Callable[[], set[int]]
) -> str:
    """Returns, once no progress was made for ``deadline_s``, what is wrong in one line. The log gets all
    stacks.

    name: of the group. finished: the ranks that are done with the tick.
    """
    clock = asyncio.get_running_loop()
    started = clock.time()
    period = min(_LOOK_EVERY_S, deadline_s / 4)
    while True:
        await asyncio.sleep(period)
        ranks = [rank for rank in range(len(workers)) if rank not in finished()]
        asked = [_beat(workers[rank], deadline_s) for rank in ranks]
        beats = dict(zip(ranks, await asyncio.gather(*asked), strict=True))
        for rank in finished():
            beats.pop(rank, None)
        guilty = stalled(beats, tick_id, clock.time() - started, deadline_s)
        if guilty is not None:
            for rank, beat in beats.items():
                _log.error("rank %d of %s %s", rank, name, _where(beat))
            return f"rank {guilty} of {name} {_complaint(beats[guilty], deadline_s)}"


def stalled(
    beats: Mapping[int, Beat | None], tick_id: int, elapsed_s: float, deadline_s: float
) -> int | None:
    """The rank that holds the tick up, or None while it gets on. None for a beat: there was no answer.

    A rank that waits in a collective is late for no fault of its own, unless all are.
    """
    late = [
        rank for rank, beat in beats.items() if _silence(beat, tick_id, elapsed_s) > _limit(beat, deadline_s)
    ]
    busy = [rank for rank in late if not _is_waiting(beats[rank])]
    if not busy and len(late) < len(beats):
        return None
    return min(busy or late, key=lambda rank: _count(beats[rank]), default=None)


def _silence(beat: Beat | None, tick_id: int, elapsed_s: float) -> float:
    """Seconds without progress in this tick. What the process did before does not count."""
    if beat is None or beat.tick_id != tick_id:
        return elapsed_s
    return min(beat.idle_s, elapsed_s)


def _limit(beat: Beat | None, deadline_s: float) -> float:
    is_on_disk = beat is not None and beat.phase in _DISK_PHASES
    return deadline_s * (_DISK_PATIENCE if is_on_disk else 1.0)


def _is_waiting(beat: Beat | None) -> bool:
    return beat is not None and beat.is_waiting


def _count(beat: Beat | None) -> int:
    return -1 if beat is None else beat.count


def _complaint(beat: Beat | None, deadline_s: float) -> str:
    if beat is None:
        return f"does not answer for {deadline_s:g} s"
    return f"has made no progress for {beat.idle_s:.1f} s in phase {beat.phase!r} of tick {beat.tick_id}"


def _where(beat: Beat | None) -> str:
    if beat is None:
        return "does not answer"
    state = "waits for others in" if beat.is_waiting else "is in"
    return (
        f"{state} phase {beat.phase!r} of tick {beat.tick_id}, last progress {beat.idle_s:.1f} s ago\n"
        f"{beat.stack}"
    )


async def _beat(worker: Any, patience_s: float) -> Beat | None:
    try:
        async with asyncio.timeout(patience_s):
            beat: Beat = await worker.beat.remote()
            return beat
    except (RayError, TimeoutError):
        return None
