"""How long results are kept: for a stated time, and less only where memory is short.

Knows request ids, tenants, times and sizes. Does not know what a result is or who may see it (promises.py).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

# What each takes beside its value: its promise, and what recognises its request when it comes again.
PROMISE_BYTES = 1024


@dataclass(slots=True)
class _Result:
    settled_at: float
    tenant: str
    num_bytes: int
    expendable: bool
    fetched: bool = False

    @property
    def whole_size(self) -> int:
        return self.num_bytes + PROMISE_BYTES


class Retention:
    """Of all settled promises, those settled first in front. An answer may get lost on its way and is asked
    for again, so one that was fetched is kept like any other while there is room.

    All tenants that have results have equal parts of ``max_bytes``. Where the whole is not enough, only those
    suffer that have more than their part: what they fetched goes, then what their clients ask for anew.
    """

    def __init__(self, retention_s: float, max_bytes: int) -> None:
        self._retention_s = retention_s
        self._max_bytes = max_bytes
        self._results: dict[str, _Result] = {}
        self._by_tenant: Counter[str] = Counter()
        self.num_bytes = 0

    def is_full(self, tenant: str) -> bool:
        """Whether results take more room than they may, and the tenant's more than their part."""
        return self.num_bytes > self._max_bytes and self._has_too_many(tenant)

    def settled(
        self, request_id: str, tenant: str, num_bytes: int, now: float, expendable: bool = False
    ) -> None:
        """expendable: its client would have it made again."""
        result = self._results[request_id] = _Result(now, tenant, num_bytes, expendable)
        self._by_tenant[tenant] += result.whole_size
        self.num_bytes += result.whole_size

    def fetched(self, request_id: str) -> None:
        """Its owner has seen it."""
        self._results[request_id].fetched = True

    def expire(self, now: float) -> tuple[list[str], list[str]]:
        """Give up what has been kept long enough, and above the limit what may go early, the oldest first;
        the ids of the former and of the latter."""
        gone = []
        for request_id, result in self._results.items():
            if result.settled_at + self._retention_s > now:
                break
            gone.append(request_id)
        for request_id in gone:
            self.drop(request_id)
        early = self._drop_early(lambda result: result.fetched)
        return gone, early + self._drop_early(lambda result: result.expendable)

    def drop(self, request_id: str) -> None:
        result = self._results.pop(request_id)
        self.num_bytes -= result.whole_size
        self._by_tenant[result.tenant] -= result.whole_size
        if not self._by_tenant[result.tenant]:
            del self._by_tenant[result.tenant]

    def _has_too_many(self, tenant: str) -> bool:
        return self._by_tenant[tenant] * len(self._by_tenant) > self._max_bytes

    def _drop_early(self, may_go: Callable[[_Result], bool]) -> list[str]:
        dropped: list[str] = []
        if self.num_bytes <= self._max_bytes:
            return dropped
        for request_id, result in list(self._results.items()):
            if result.num_bytes and may_go(result) and self._has_too_many(result.tenant):
                self.drop(request_id)
                dropped.append(request_id)
                if self.num_bytes <= self._max_bytes:
                    break
        return dropped
