"""The table of promises: every accepted request is pending until it has a value or a failure, for good.

Knows owners, waiters and retention. Does not know what was promised or what a value is.
"""

from __future__ import annotations

import secrets
import sys
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass, field
from typing import Any

from twinkle_serve.control.backend import SAMPLING_ID_PREFIX, TRAINING_ID_PREFIX, Poll
from twinkle_serve.control.results import Retention
from twinkle_serve.protocol.work import Failure

GONE = Poll("gone")
_PENDING = Poll("pending")
Waiter = Callable[[], object]


def random_token() -> str:
    """128 random bits as text that fits into a URL."""
    return secrets.token_urlsafe(16)


@dataclass(slots=True)
class Promise:
    """``origin`` is whatever its maker wants back from ``sweep``."""

    request_id: str
    tenant: str
    origin: Hashable
    poll: Poll = _PENDING
    progress: list[Any] = field(default_factory=list)
    waiters: dict[int, Waiter] = field(default_factory=dict)
    num_bytes: int = 0


@dataclass(slots=True)
class Pending:
    """What of one tenant's has no result yet."""

    requests: int = 0
    num_bytes: int = 0


_NOTHING = Pending()


class PromiseTable:
    """Settled promises can be polled again and again until ``retention_s`` after settling: a response
    that got lost on its way is asked for a second time. Results above ``max_bytes``: see Retention."""

    def __init__(
        self,
        retention_s: float,
        new_token: Callable[[], str] = random_token,
        max_bytes: int = sys.maxsize,
    ) -> None:
        self._results = Retention(retention_s, max_bytes)
        self._new_token = new_token
        self._dropped: list[str] = []
        # The origins of promises that were lost, until they are forgotten.
        self._lost: dict[str, Hashable] = {}
        self._promises: dict[str, Promise] = {}
        self._num_waiters = 0
        self._pending: dict[str, Pending] = {}
        self.num_pending = 0
        # Told of each promise once it is no longer pending; one that was lost still says so of itself.
        self.on_end: Callable[[Promise], object] = lambda promise: None

    def __len__(self) -> int:
        return len(self._promises)

    def open(self, tenant: str, origin: Hashable, sampling: bool = False, num_bytes: int = 0) -> str:
        """A new pending promise for a request that holds ``num_bytes`` until it is settled. The id cannot
        be guessed, and its prefix tells sampling from training even when the promise is long forgotten."""
        request_id = f"{SAMPLING_ID_PREFIX if sampling else TRAINING_ID_PREFIX}{self._new_token()}"
        self._add(Promise(request_id, tenant, origin, num_bytes=num_bytes))
        return request_id

    def reopen(self, request_id: str, tenant: str, origin: Hashable) -> None:
        """A promise of an earlier life of this server, pending again under its old id."""
        if request_id in self._lost:
            del self._lost[request_id]
            self._results.drop(request_id)
        self._add(Promise(request_id, tenant, origin))

    def pending_of(self, tenant: str) -> Pending:
        return self._pending.get(tenant, _NOTHING)

    def settled(self, request_id: str) -> Poll | None:
        """What it was settled with, whoever owns it; None if it is pending or forgotten."""
        promise = self._promises.get(request_id)
        return promise.poll if promise is not None and promise.poll.state == "done" else None

    def is_pending(self, request_id: str) -> bool:
        promise = self._promises.get(request_id)
        return promise is not None and promise.poll.state == "pending"

    def wake_all(self) -> None:
        """Let everybody who waits look again now."""
        for promise in self._promises.values():
            self._wake(promise)

    def look(self, tenant: str, request_id: str) -> Poll:
        """What the owner sees now. Another tenant's promise is gone, as if it never was."""
        promise = self._promises.get(request_id)
        if promise is None or promise.tenant != tenant:
            return GONE
        if promise.poll.state == "done":
            self._results.fetched(request_id)
        return promise.poll

    def is_full(self, tenant: str) -> bool:
        """Whether the tenant's results take more room than they may, so that it should get no new promise."""
        return self._results.is_full(tenant)

    def origin(self, request_id: str) -> Hashable:
        return self._promises[request_id].origin

    def run_of(self, request_id: str) -> str | None:
        """The run that a known training request belongs to."""
        promise = self._promises.get(request_id)
        origin = promise.origin if promise is not None else None
        return str(origin[1]) if isinstance(origin, tuple) and origin[0] == "run" else None

    def resolve(self, request_id: str, value: Any, now: float, num_bytes: int = 0) -> None:
        """num_bytes: about what the value takes, here or where it lies."""
        self._settle(request_id, Poll("done", value=value), now, num_bytes)

    def fail(self, request_id: str, failure: Failure, now: float) -> None:
        self._settle(request_id, Poll("done", failure=failure), now, len(failure.message))

    def fail_all(self, failure: Failure, now: float) -> None:
        """Settle whatever is still pending."""
        for request_id in [p.request_id for p in self._promises.values() if p.poll.state == "pending"]:
            self.fail(request_id, failure, now)

    def lose(self, request_id: str, now: float) -> None:
        """Drop a pending promise: to its owner it is gone, which makes the SDK submit a sample again. Its
        origin is remembered as long as that of any other: its client may have slept and ask what became of
        it."""
        promise = self._promises.get(request_id)
        if promise is not None and promise.poll.state == "pending":
            del self._promises[request_id]
            self._no_longer_pending(promise)
            self._lost[request_id] = promise.origin
            self._results.settled(request_id, promise.tenant, 0, now)
            self._wake(promise)
            self.on_end(promise)

    def advance(self, request_id: str, news: Iterable[Any]) -> None:
        """Parts of what a pending promise will hold, for those who do not want to wait for the whole."""
        promise = self._promises.get(request_id)
        if promise is not None and promise.poll.state == "pending":
            promise.progress.extend(news)
            self._wake(promise)

    def progress(self, tenant: str, request_id: str, after: int) -> tuple[Any, ...]:
        """What ``advance`` gave besides the first ``after`` parts; nothing once the promise is settled."""
        promise = self._promises.get(request_id)
        return tuple(promise.progress[after:]) if promise is not None and promise.tenant == tenant else ()

    def subscribe(self, request_id: str, waiter: Waiter) -> Callable[[], None]:
        """Call ``waiter`` once, when the pending promise settles or advances. Returns how to undo this."""
        promise = self._promises[request_id]
        assert promise.poll.state == "pending"
        self._num_waiters += 1
        key = self._num_waiters
        promise.waiters[key] = waiter
        return lambda: promise.waiters.pop(key, None) and None

    def sweep(self, now: float) -> list[Hashable]:
        """Forget what has been kept long enough; the origins of the forgotten promises."""
        gone, early = self._results.expire(now)
        self._dropped += early
        return [
            self._lost.pop(request_id) if request_id in self._lost else self._promises.pop(request_id).origin
            for request_id in (*gone, *early)
        ]

    def take_dropped(self) -> list[str]:
        """The ids of what ``sweep`` forgot before its time, since the last call."""
        dropped, self._dropped = self._dropped, []
        return dropped

    def _add(self, promise: Promise) -> None:
        assert promise.request_id not in self._promises
        self._promises[promise.request_id] = promise
        self.num_pending += 1
        pending = self._pending.setdefault(promise.tenant, Pending())
        pending.requests += 1
        pending.num_bytes += promise.num_bytes

    def _no_longer_pending(self, promise: Promise) -> None:
        self.num_pending -= 1
        pending = self._pending[promise.tenant]
        pending.requests -= 1
        pending.num_bytes -= promise.num_bytes
        if not pending.requests:
            del self._pending[promise.tenant]

    def _settle(self, request_id: str, poll: Poll, now: float, num_bytes: int = 0) -> None:
        # The first answer stands: a cancelled sample may still come in, a lost tick may still report.
        promise = self._promises.get(request_id)
        if promise is None or promise.poll.state != "pending":
            return
        promise.poll = poll
        promise.progress = []
        self._no_longer_pending(promise)
        expendable = request_id.startswith(SAMPLING_ID_PREFIX)
        self._results.settled(request_id, promise.tenant, num_bytes, now, expendable)
        self._wake(promise)
        self.on_end(promise)

    def _wake(self, promise: Promise) -> None:
        waiters, promise.waiters = promise.waiters, {}
        for waiter in waiters.values():
            waiter()
