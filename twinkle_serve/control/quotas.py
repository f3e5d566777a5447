"""What each tenant may use, what it uses, and why some of its requests have to wait.

Knows limits, the registries and the rate of tokens. Does not know how a request waits (planner.py,
admission.py) nor how a client is told (service.py). Nothing that was accepted is ever failed for a limit: a
pass waits for the rate, a new run for another to end, a save for room. What can be refused before it
is accepted is refused as Busy, which clients try again.
"""

from __future__ import annotations

from collections.abc import Callable

from twinkle_serve.config import LimitsConfig, TenantLimits
from twinkle_serve.control.backend import PassCommand, SaveCommand
from twinkle_serve.control.checkpoints import Checkpoints
from twinkle_serve.control.clock import Clock
from twinkle_serve.control.commands import BirthCommand, RunCommand
from twinkle_serve.control.promises import PromiseTable
from twinkle_serve.control.rates import TokenBucket
from twinkle_serve.control.runs import Run, Runs
from twinkle_serve.control.sessions import Sessions
from twinkle_serve.protocol.errors import CAPACITY, RATE, Busy

Reason = tuple[str, str]
"""A queue_state of the SDK, and the words its user reads."""


def own_name(tenant: str) -> str:
    return tenant


Places = dict[str, set[str]]
"""By tenant: the runs that may have an adapter, as it was when this was first asked. Good until anything of
a run or a session changes; with it a thousand runs that wait cost one look at each, not at each for each."""


class Quotas:
    """Of all tenants. ``name_of``: by which a tenant may be listed in ``limits.tenants`` besides its id."""

    def __init__(
        self,
        limits: LimitsConfig,
        clock: Clock,
        promises: PromiseTable,
        sessions: Sessions,
        runs: Runs,
        checkpoints: Checkpoints,
        name_of: Callable[[str], str] = own_name,
    ) -> None:
        self._limits = limits
        self._clock = clock
        self._promises = promises
        self._sessions = sessions
        self._runs = runs
        self._checkpoints = checkpoints
        self._name_of = name_of
        self._buckets: dict[str, TokenBucket] = {}
        self._throttled: set[str] = set()

    def of(self, tenant: str) -> TenantLimits:
        return self._limits.of(tenant, self._name_of(tenant))

    def weight(self, tenant: str) -> float:
        return self.of(tenant).weight

    # before a request is accepted -----------------------------------------------------------------

    def check_room(self, tenant: str, num_bytes: int = 0) -> None:
        """Raises Busy when too much of the tenant's is pending to accept ``num_bytes`` more."""
        limits, pending = self.of(tenant), self._promises.pending_of(tenant)
        if pending.requests >= limits.pending_requests:
            raise Busy(f"{pending.requests} of your requests have no result yet, and more may not be pending")
        if num_bytes and pending.num_bytes and pending.num_bytes + num_bytes > limits.pending_bytes:
            raise Busy(
                f"your pending requests hold {pending.num_bytes} bytes; with {num_bytes} more it would be "
                f"above {limits.pending_bytes}"
            )

    def check_sessions(self, tenant: str) -> None:
        """Raises Busy when the tenant has as many active sessions as it may have."""
        most = self.of(tenant).sessions
        if self._sessions.num_active_of(tenant) >= most:
            raise Busy(f"you have {most} active sessions (limits.tenant.sessions); finish some", CAPACITY)

    def check_checkpoints(self, tenant: str) -> None:
        """Raises Busy when the tenant's checkpoints leave no room for another."""
        reason = self._full(tenant)
        if reason is not None:
            raise Busy(reason[1], reason[0])

    # while it waits -------------------------------------------------------------------------------

    def reason_to_wait(self, run: Run, command: RunCommand, places: Places | None = None) -> Reason | None:
        """Why ``command``, the next of its run, may not start yet. places: filled and used again, for who
        asks about many runs at one moment."""
        match command:
            case PassCommand():
                return self.too_fast(run.tenant)
            case SaveCommand():
                return self._full(run.tenant)
            case BirthCommand():
                return self._too_many(run, {} if places is None else places)
        return None

    def too_fast(self, tenant: str) -> Reason | None:
        """Why no work that costs tokens may start; it may after ``next_refill``."""
        limits = self.of(tenant)
        wait_s = self._bucket(tenant, limits).wait_s(self._clock.now())
        if wait_s == 0:
            self._throttled.discard(tenant)
            return None
        self._throttled.add(tenant)
        return RATE, f"you may use {limits.tokens_per_s:g} tokens a second; in {wait_s:.1f} s it goes on"

    def next_refill(self) -> float | None:
        """When the first tenant that was too fast may go on; None if none was."""
        now = self._clock.now()
        waits = {tenant: self._bucket(tenant, self.of(tenant)).wait_s(now) for tenant in self._throttled}
        self._throttled = {tenant for tenant, wait_s in waits.items() if wait_s}
        return now + min(waits.values()) if waits else None

    def spend(self, tenant: str, tokens: int) -> None:
        """The tenant's work of so many tokens is under way, or done."""
        if tokens:
            self._bucket(tenant, self.of(tenant)).take(tokens, self._clock.now())

    def _bucket(self, tenant: str, limits: TenantLimits) -> TokenBucket:
        bucket = self._buckets.get(tenant)
        if bucket is None:
            bucket = TokenBucket(limits.tokens_per_s, limits.token_burst_s, self._clock.now())
            self._buckets[tenant] = bucket
        return bucket

    def _full(self, tenant: str) -> Reason | None:
        used, most = self._checkpoints.bytes_of(tenant), self.of(tenant).checkpoint_bytes
        if used < most:
            return None
        return CAPACITY, f"your checkpoints have {used} of {most} bytes; delete some and the save goes on"

    def _too_many(self, run: Run, places: Places) -> Reason | None:
        most = self.of(run.tenant).live_runs
        if run.tenant not in places:
            places[run.tenant] = self._with_a_place(run.tenant, most)
        if run.run_id in places[run.tenant]:
            return None
        return CAPACITY, f"you have {most} runs, and no more at once; this one starts when another one ends"

    def _with_a_place(self, tenant: str, most: int) -> set[str]:
        """Runs get their adapters in the order in which they were asked for: those with fewer than ``most``
        before them."""
        found: set[str] = set()
        older = 0
        for run in self._runs.oldest_first(tenant):
            if older == most:
                break
            found.add(run.run_id)
            older += run.wants_adapter and self._sessions.is_active(run.record.session_id)
        return found
