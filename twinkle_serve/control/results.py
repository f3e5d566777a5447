"""How long results are kept: for a stated time, and less only where memory is short and they were fetched.

Knows request ids, times and sizes. Does not know what a result is or who may see it (promises.py).
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True)
class _Result:
    settled_at: float
    num_bytes: int
    fetched: bool = False


class Retention:
    """Of all settled promises, those settled first in front. An answer may get lost on its way and is asked
    for again, so one that was fetched is kept like any other while there is room."""

    def __init__(self, retention_s: float, max_bytes: int) -> None:
        self._retention_s = retention_s
        self._max_bytes = max_bytes
        self._results: dict[str, _Result] = {}
        self.num_bytes = 0

    @property
    def is_full(self) -> bool:
        return self.num_bytes > self._max_bytes

    def settled(self, request_id: str, num_bytes: int, now: float) -> None:
        self._results[request_id] = _Result(now, num_bytes)
        self.num_bytes += num_bytes

    def fetched(self, request_id: str) -> None:
        """Its owner has seen it."""
        self._results[request_id].fetched = True

    def expire(self, now: float) -> tuple[list[str], list[str]]:
        """Give up what has been kept long enough, and above the limit what was fetched, the oldest first;
        the ids of the former and of the latter."""
        gone = []
        for request_id, result in self._results.items():
            if result.settled_at + self._retention_s > now:
                break
            gone.append(request_id)
        self._drop(gone)
        early: list[str] = []
        excess = self.num_bytes - self._max_bytes
        for request_id, result in self._results.items():
            if excess <= 0:
                break
            if result.fetched and result.num_bytes:
                early.append(request_id)
                excess -= result.num_bytes
        self._drop(early)
        return gone, early

    def _drop(self, request_ids: list[str]) -> None:
        for request_id in request_ids:
            self.num_bytes -= self._results.pop(request_id).num_bytes
