"""What a client is told that asks after a request: its result, or how it stands and why.

Knows promises, and what makes a request wait: a lost group, a limit, a disk, others in front. Does not know
how anything is done, nor how long an answer may take on the wire (gateway/futures.py).
"""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any

from twinkle_serve.control.backend import Poll
from twinkle_serve.control.books import Books
from twinkle_serve.control.clock import Clock
from twinkle_serve.control.driver import GroupDriver
from twinkle_serve.control.groups import Drivers, driver_of
from twinkle_serve.control.insight import gap_in_words, in_words
from twinkle_serve.control.keeper import Keeper
from twinkle_serve.control.quotas import Reason
from twinkle_serve.control.sampling import Sampling

RECOVERING = "the service is recovering from a failure; nothing that was accepted is lost"
HELD = "this run cannot be restored at the moment; it is tried again, and nothing that was accepted is lost"
_NOT_SERVED = "the base model of this run is not loaded"
_FULL = "this server's room for adapters is full; a new run starts once another one ends"


class Polling:
    """See control.backend.Backend for what the methods of these names promise."""

    def __init__(
        self, books: Books, drivers: Drivers, sampling: Sampling, clock: Clock, keeper: Keeper | None
    ) -> None:
        self._keeper = keeper
        self._books = books
        self._drivers = drivers
        self._sampling = sampling
        self._clock = clock

    async def poll(self, tenant: str, request_id: str, timeout_s: float) -> Poll:
        promises = self._books.promises
        poll = self._look(tenant, request_id)
        if poll.state != "pending":
            return poll
        if timeout_s <= 0:
            with self._sampling.asked_for(request_id):
                return poll
        woken = asyncio.Event()
        unsubscribe = promises.subscribe(request_id, woken.set)
        timer = self._clock.call_later(timeout_s, woken.set)
        try:
            with self._sampling.asked_for(request_id):
                await woken.wait()
        finally:
            timer.cancel()
            unsubscribe()
        return self._look(tenant, request_id)

    def _look(self, tenant: str, request_id: str) -> Poll:
        promises = self._books.promises
        poll = promises.look(tenant, request_id)
        if poll.state != "pending":
            return poll
        origin = promises.origin(request_id)
        drivers = self._drivers_of(origin)
        if not drivers:
            return replace(poll, queue_state="paused_capacity", queue_reason=_NOT_SERVED)
        if any(driver.lost is not None for driver in drivers):
            return replace(poll, queue_state="paused_capacity", queue_reason=RECOVERING)
        run = self._books.runs.find(promises.run_of(request_id) or "")
        if run is not None and run.log.is_held:
            return replace(poll, queue_state="paused_capacity", queue_reason=HELD)
        if run is not None and self._keeper is not None:
            unwritten = self._keeper.reason_to_wait(run, self._books.watch.seq_id_of(request_id))
            if unwritten is not None:
                return replace(poll, queue_state="paused_capacity", queue_reason=unwritten)
        limit = self._over_limit(tenant, request_id, origin)
        if limit is not None:
            return replace(poll, queue_state=limit[0], queue_reason=limit[1])
        is_birth = isinstance(origin, tuple) and origin[0] == "run" and origin[2] == 0
        if is_birth and any(driver.is_full() for driver in drivers):
            return replace(poll, queue_state="paused_capacity", queue_reason=_FULL)
        reason = self._standing(tenant, request_id, drivers)
        return poll if reason is None else replace(poll, queue_state="paused_capacity", queue_reason=reason)

    def _standing(self, tenant: str, request_id: str, drivers: list[GroupDriver]) -> str | None:
        """Where a request stands that waits for others, in words; None if it is being worked on."""
        run_id = self._books.promises.run_of(request_id)
        run = None if run_id is None else self._books.runs.find(run_id)
        if run is not None:
            if self._books.watch.is_running(request_id):
                return None
            standings = [driver.run_standing(run) for driver in drivers]
            gap = gap_in_words(run, self._books.watch.seq_id_of(request_id))
            if gap is not None:
                return gap
        else:
            standings = [driver.sample_standing(tenant, request_id) for driver in drivers]
        return next((in_words(*standing) for standing in standings if standing is not None), None)

    def _over_limit(self, tenant: str, request_id: str, origin: Any) -> Reason | None:
        """What the tenant uses so much of that the request, or one before it in its run, has to wait."""
        if not isinstance(origin, tuple):
            return None
        if origin[0] != "run":
            found = (driver.too_fast(tenant, request_id) for driver in self._drivers.values())
            return next(filter(None, found), None)
        run = self._books.runs.find(origin[1])
        if run is None or not run.log.ready:
            return None
        return self._books.quotas.reason_to_wait(run, run.log.ready[0].command)

    async def follow(self, tenant: str, request_id: str, after: int, timeout_s: float) -> Poll:
        promises = self._books.promises
        if promises.progress(tenant, request_id, after):
            timeout_s = 0.0
        poll = await self.poll(tenant, request_id, timeout_s)
        if poll.state != "pending":
            return poll
        return Poll("pending", promises.progress(tenant, request_id, after), None, poll.queue_state)

    def _drivers_of(self, origin: Any) -> list[GroupDriver]:
        """The groups that may be at work on a request."""
        run = self._books.runs.find(origin[1]) if isinstance(origin, tuple) and origin[0] == "run" else None
        if run is None:
            return list(self._drivers.values())
        driver = driver_of(self._drivers, run)
        return [] if driver is None else [driver]
