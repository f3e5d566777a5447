"""Which samples of a sampling session have ended, for clients that wait for all of theirs with one poll.

Knows request ids in the order they ended, and cursors into that order. Does not know results: those are
fetched one by one (promises.py).

Samples are not journaled, so a client whose cursor comes from an earlier life of this server may wait for
samples that nobody remembers. It is told so, because nothing would ever end its wait.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from twinkle_serve.control.backend import Ended, Poll
from twinkle_serve.control.clock import Clock
from twinkle_serve.control.promises import Promise, PromiseTable

CLONE_SIZE = 10**9
"""Copies of a sampling client number their requests from multiples of this."""
_TICKS_PER_S = 1_000_000
_IDLE_S = 600.0

Key = tuple[str, int]


@dataclass(slots=True)
class _Line:
    """What one client waits for. ended: (cursor, request), the oldest first; those that it has confirmed are
    gone. num_waiting: its polls that are held now; asked_at: when the last one came or went."""

    asked_at: float
    ended: deque[tuple[int, Ended]] = field(default_factory=deque)
    news: asyncio.Event = field(default_factory=asyncio.Event)
    num_waiting: int = 0


class Completions:
    """Lines are kept for clients that poll this way, from their first poll on.

    first_cursor: above every cursor of an earlier life, which is why it counts microseconds.
    """

    def __init__(self, promises: PromiseTable, clock: Clock, wall_s: float) -> None:
        self._promises = promises
        self._clock = clock
        self._first = int(wall_s * _TICKS_PER_S)
        self._cursor = self._first
        self._lines: dict[Key, _Line] = {}
        promises.on_end = self._note

    def is_of_this_life(self, cursor: int, num_known: int) -> bool:
        """Whether a client with ``cursor`` waits for nothing that is older than this server. num_known: its
        requests that are remembered; who polls without any has sent them to somebody else."""
        return cursor >= self._first or (cursor == 0 and num_known > 0)

    def since(self, key: Key, cursor: int, known: list[str]) -> tuple[tuple[Ended, ...], int]:
        """What ended after ``cursor``, and the cursor after that. ``known``: the client's requests so far,
        which tell what ended before its first poll."""
        line = self._lines.get(key)
        if line is None:
            line = self._lines[key] = _Line(self._clock.now())
            for request_id in known:
                if not self._promises.is_pending(request_id):
                    self._append(line, request_id, self._promises.settled(request_id))
        while line.ended and line.ended[0][0] <= cursor:
            line.ended.popleft()
        line.asked_at = self._clock.now()
        newest = line.ended[-1][0] if line.ended else max(cursor, self._first)
        return tuple(ended for _, ended in line.ended), newest

    @contextmanager
    def waiting(self, key: Key) -> Iterator[asyncio.Event]:
        """The event of the next end, while a poll waits for it."""
        line = self._lines[key]
        line.news.clear()
        line.num_waiting += 1
        try:
            yield line.news
        finally:
            line.num_waiting -= 1
            line.asked_at = self._clock.now()

    def asked_at(self, key: Key) -> float | None:
        """When the client of this line was last there; None if it does not poll this way."""
        line = self._lines.get(key)
        if line is None:
            return None
        return self._clock.now() if line.num_waiting else line.asked_at

    def sweep(self) -> None:
        """Forget the lines of clients that are gone."""
        limit = self._clock.now() - _IDLE_S
        for key in [k for k, line in self._lines.items() if line.asked_at < limit and not line.num_waiting]:
            del self._lines[key]

    def _note(self, promise: Promise) -> None:
        key = line_of(promise.origin)
        line = None if key is None else self._lines.get(key)
        if line is not None:
            self._append(line, promise.request_id, promise.poll if promise.poll.state == "done" else None)
            line.news.set()

    def _append(self, line: _Line, request_id: str, poll: Poll | None) -> None:
        """poll: what it ended with, None if it is gone."""
        self._cursor += 1
        fine = poll is not None and poll.failure is None
        line.ended.append((self._cursor, Ended(request_id, fine)))


def line_of(origin: object) -> Key | None:
    """The line of a numbered sample of a sampling session."""
    match origin:
        case ("sampler", str(sampler_id), int(seq_id)):
            return sampler_id, seq_id // CLONE_SIZE
    return None
