"""Which commands make up the next tick: fair between tenants, in order within a run, together if it pays.

Knows logs, token costs and who was in step with whom. Does not know slots, payloads or how a tick is run.

Fairness is deficit round robin with an infinitesimal quantum: each tenant has an account of the tokens it
was served, divided by its weight, and the next request is always one of the tenant with the least. A
tenant that was idle comes back at the level at which the last tick began, so nobody saves up credit. A
request that no longer fits into a tick waits for the next one, at whose start the budget is whole; one that
is larger than the whole budget is served when nothing else is in the tick. Planning costs what the tick
takes, however much waits: once a tick has something, the search for more ends after some requests that do not
fit.

Company: two clients that each send forward_backward and optim_step share a pass only if both are there
when it starts. So before a pass starts, runs that were in the last pass and have nothing ready now get
some milliseconds to come back: at most ``company_wait_s``, at most half of what the last pass took (or
waiting would cost more than sharing gains), and only for runs that usually are that fast. Work
without passes (optimizer steps, saves) never waits: its answers are what those clients are waiting for.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from twinkle_serve.control.backend import PassCommand, UnloadCommand
from twinkle_serve.control.commands import RunCommand, RunEntry, Stage, cost, next_stage, num_tokens
from twinkle_serve.control.log import CommandLog

# Requests in a row that do not fit into a tick before it is taken for full. Those behind them lose nothing:
# what goes into the tick is charged, and who is charged falls behind them.
_MAX_MISSES = 64


@dataclass(slots=True)
class RunWork:
    """The part of one run in one tick: its next commands, in an order that the tick keeps."""

    run_id: str
    tenant: str
    entries: list[RunEntry] = field(default_factory=list)
    stage: Stage = Stage.START

    @property
    def has_pass(self) -> bool:
        return any(isinstance(entry.command, PassCommand) for entry in self.entries)


@dataclass(frozen=True, slots=True)
class Window:
    """What to run now, maybe nothing; ``company_until``: when to ask again because passes wait for
    company (None: whenever something new comes)."""

    work: tuple[RunWork, ...]
    company_until: float | None = None


_Rank = tuple[float, int, str]


@dataclass(slots=True)
class _Tenant:
    """``runs`` are those with something ready, the longest waiting first. entry: its place in the planner's
    heap, by identity: others are out of date."""

    name: str
    weight: float
    served: float = 0.0
    turn: int = 0
    runs: dict[str, CommandLog[RunCommand]] = field(default_factory=dict)
    entry: _Rank | None = None

    @property
    def rank(self) -> _Rank:
        """Of all tenants with something ready the one with the least of this is next."""
        return self.served, self.turn, self.name


@dataclass(slots=True)
class _Fill:
    """A tick while it is being filled. aside: tenants that have nothing more for it."""

    tokens_left: int
    passes: bool
    slot_charge: float
    work: dict[str, RunWork] = field(default_factory=dict)
    num_tokens: int = 0
    num_misses: int = 0
    cursors: dict[str, _Cursor] = field(default_factory=dict)
    aside: list[_Tenant] = field(default_factory=list)

    @property
    def is_full(self) -> bool:
        return bool(self.work) and self.num_misses >= _MAX_MISSES


class Planner:
    """Plans one group's ticks, one at a time: ``next``, run it, ``finished``."""

    def __init__(
        self,
        *,
        tick_tokens: int,
        max_runs: int,
        company_wait_s: float,
        weight: Callable[[str], float] = lambda tenant: 1.0,
        blocked: Callable[[RunEntry], bool] = lambda entry: False,
        spend: Callable[[str, int], None] = lambda tenant, tokens: None,
    ) -> None:
        """max_runs: runs in one tick, i.e. slots. blocked: whether a command must not start yet. spend: told
        of each command that does, by tenant and tokens."""
        self._tick_tokens = tick_tokens
        self._max_runs = max_runs
        self._company_wait_s = company_wait_s
        self._weight = weight
        self._blocked = blocked
        self._spend = spend
        self._tenants: dict[str, _Tenant] = {}
        # Of every tenant with something ready, and of some without.
        self._heap: list[_Rank] = []
        self._queued: dict[str, CommandLog[RunCommand]] = {}
        self._running: dict[str, tuple[str, CommandLog[RunCommand]]] = {}
        self._in_step: set[str] = set()
        self._pass_started: float | None = None
        self._pass_seconds = 0.0
        self._think: dict[str, _ThinkTime] = {}
        self._waiting_since: float | None = None
        self._floor = 0.0
        self._turns = 0

    @property
    def has_work(self) -> bool:
        return bool(self._queued)

    @property
    def num_waiting(self) -> int:
        """Runs that have something ready and are not in a tick."""
        return len(self._queued)

    def position(self, tenant_name: str, run_id: str) -> int | None:
        """About how many runs are served up to and with this one: tenants take turns, and each one's runs
        go in the order in which they came. None if the run does not wait."""
        if run_id not in self._queued:
            return None
        tenant = self._tenants[tenant_name]
        place = list(tenant.runs).index(run_id) + 1
        others = (each for each in self._tenants.values() if each is not tenant)
        # The others come once before each turn of this tenant if they were served less, else between two.
        return place + sum(min(len(o.runs), place - (o.rank > tenant.rank)) for o in others)

    def ready(self, tenant_name: str, run_id: str, log: CommandLog[RunCommand], now: float) -> None:
        """Something was added to ``log.ready``."""
        if not log.ready or run_id in self._queued or run_id in self._running:
            return
        if run_id in self._think:
            self._think[run_id].came(now, isinstance(log.ready[0].command, PassCommand))
        tenant = self._tenants.get(tenant_name)
        if tenant is None:
            tenant = self._tenants[tenant_name] = _Tenant(tenant_name, self._weight(tenant_name))
        if not tenant.runs:
            tenant.served = max(tenant.served, self._floor)
            self._push(tenant)
        tenant.runs[run_id] = self._queued[run_id] = log

    def next(self, now: float) -> Window:
        """Take the commands of the next tick out of the logs. Call ``finished`` before the next call."""
        assert not self._running
        company_until = self._company_until(now)
        fill = _Fill(self._tick_tokens, company_until is None, self._slot_charge())
        self._fill(fill)
        for work in fill.work.values():
            tenant = self._tenants[work.tenant]
            self._running[work.run_id] = (work.tenant, tenant.runs.pop(work.run_id))
            del self._queued[work.run_id]
            if isinstance(work.entries[-1].command, UnloadCommand):
                self.leave(work.run_id)
        for tenant in fill.aside:
            self._push(tenant)
        if fill.num_tokens:
            self._in_step = {work.run_id for work in fill.work.values() if work.has_pass}
            self._waiting_since = None
            self._pass_started = now
        return Window(tuple(fill.work.values()), company_until)

    def finished(self, now: float) -> None:
        """The last window is over; its runs may have more."""
        if self._pass_started is not None:
            self._pass_seconds = now - self._pass_started
            self._pass_started = None
        running, self._running = self._running, {}
        for run_id, (tenant, log) in running.items():
            if run_id in self._in_step:
                self._think.setdefault(run_id, _ThinkTime())
            if run_id in self._think:
                self._think[run_id].left(now)
            self.ready(tenant, run_id, log, now)

    # company --------------------------------------------------------------------------------------

    def _company_until(self, now: float) -> float | None:
        """Until when passes wait, or None if they may start now."""
        longest = min(self._company_wait_s, self._pass_seconds / 2)
        # Not as a difference of sets, which would walk through all that is queued.
        absent = [run_id for run_id in self._in_step if run_id not in self._queued]
        is_due = any(self._think[run_id].usual_s <= longest for run_id in absent)
        if not is_due or not 0 < self._tokens_waiting() < self._tick_tokens:
            self._waiting_since = None
            return None
        if self._waiting_since is None:
            self._waiting_since = now
        until = self._waiting_since + longest
        return until if now < until else None

    def _tokens_waiting(self) -> int:
        """Of the first commands of all runs; no more than fill a tick are counted."""
        total = 0
        for log in self._queued.values():
            total += cost(log.ready[0].command)
            if total >= self._tick_tokens:
                break
        return total

    def leave(self, run_id: str) -> None:
        """The run is over: nobody waits for it."""
        self._in_step.discard(run_id)
        self._think.pop(run_id, None)

    # fairness -------------------------------------------------------------------------------------

    def _slot_charge(self) -> float:
        # With more runs than slots, a slot is what is scarce, and tiny requests must pay for theirs.
        return self._tick_tokens / self._max_runs if len(self._queued) > self._max_runs else 0.0

    def _fill(self, fill: _Fill) -> None:
        first = self._pop()
        if first is None:
            return
        self._floor = max(self._floor, first.served)
        tenant: _Tenant | None = first
        while tenant is not None:
            if self._serve(tenant, fill):
                self._push(tenant)
            else:
                fill.aside.append(tenant)
            if fill.is_full:
                break
            tenant = self._pop()

    def _push(self, tenant: _Tenant) -> None:
        tenant.entry = tenant.rank
        heapq.heappush(self._heap, tenant.entry)

    def _pop(self) -> _Tenant | None:
        """Of all tenants with something ready the one that is next."""
        while self._heap:
            entry = heapq.heappop(self._heap)
            tenant = self._tenants[entry[2]]
            if tenant.entry is entry:
                tenant.entry = None
                if tenant.runs:
                    return tenant
        return None

    def _serve(self, tenant: _Tenant, fill: _Fill) -> bool:
        """Take the tenant's next command; False if no other of its commands fits into this tick."""
        cursor = fill.cursors.get(tenant.name)
        if cursor is None:
            cursor = fill.cursors[tenant.name] = _Cursor(iter(tenant.runs.items()))
        while cursor.run is not None and not fill.is_full:
            run_id, log = cursor.run
            if self._take(tenant, run_id, log, fill):
                fill.num_misses = 0
                # What follows at no cost (an optimizer step) must not wait for a second turn.
                while log.ready and not cost(log.ready[0].command):
                    if not self._take(tenant, run_id, log, fill):
                        break
                return True
            fill.num_misses += 1
            cursor.advance()
        return False

    def _take(self, tenant: _Tenant, run_id: str, log: CommandLog[RunCommand], fill: _Fill) -> bool:
        if not log.ready:
            return False
        entry = log.ready[0]
        work = fill.work.get(run_id)
        stage = next_stage(work.stage if work else Stage.START, entry.command)
        tokens = cost(entry.command)
        fits = tokens <= fill.tokens_left or fill.num_tokens == 0
        if stage is None or not fits or (tokens and not fill.passes) or self._blocked(entry):
            return False
        charge = float(tokens)
        if work is None:
            if len(fill.work) == self._max_runs:
                return False
            work = fill.work[run_id] = RunWork(run_id, tenant.name)
            charge += fill.slot_charge
        work.entries.append(log.ready.popleft())
        work.stage = stage
        fill.num_tokens += tokens
        fill.tokens_left -= tokens
        self._charge(tenant, charge)
        self._spend(tenant.name, num_tokens(entry.command))
        return True

    def _charge(self, tenant: _Tenant, charge: float) -> None:
        tenant.served += charge / tenant.weight
        if charge:
            self._turns += 1
            tenant.turn = self._turns


@dataclass(slots=True)
class _ThinkTime:
    """How long a run's client takes from the answer to one pass to the next pass, not counting time that
    the server took in between; smoothed."""

    usual_s: float = 0.0
    since: float = 0.0
    total_s: float = 0.0

    def left(self, now: float) -> None:
        self.since = now

    def came(self, now: float, with_pass: bool) -> None:
        self.total_s += now - self.since
        if with_pass:
            self.usual_s = (self.usual_s + self.total_s) / 2
            self.total_s = 0.0


class _Cursor:
    """The run of a tenant from which the tick takes next."""

    def __init__(self, runs: Iterator[tuple[str, CommandLog[RunCommand]]]) -> None:
        self._runs = runs
        self.run = next(runs, None)

    def advance(self) -> None:
        self.run = next(self._runs, None)
