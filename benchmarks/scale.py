"""Part ``scale``: a cluster on paper. The planner and the slot map are the real ones; what a tick costs is
measured first, in the same process; clients and the clock are simulated.

Knows queues and events. Does not know any network, node or rank: a group is something that takes so long for
a tick. ``python -m benchmarks.scale`` prints the assumptions beside the result.
"""

from __future__ import annotations

import argparse
import heapq
import itertools
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from benchmarks.measure import Budget, quantile
from benchmarks.table import Rows
from twinkle_serve.control.backend import OptimCommand, PassCommand
from twinkle_serve.control.commands import RunCommand, num_tokens
from twinkle_serve.control.log import CommandLog
from twinkle_serve.control.planner import Planner, Window
from twinkle_serve.control.residency import Residency
from twinkle_serve.protocol.data import AdamParams

DAY_S = 86_400.0
GROUPS = (1, 2, 4, 8, 16, 32, 64)
_OPTIM = OptimCommand(AdamParams())


@dataclass(frozen=True, slots=True)
class Costs:
    """What one group needs. fixed_s: of any tick with work; run_s: more for each run in it; token_s: for each
    token; page_s: for one adapter in and one out. Bytes: of an adapter with its moments and gradients, and in
    the journal for each token."""

    fixed_s: float
    run_s: float
    token_s: float
    page_s: float
    page_bytes: float
    journal_bytes_per_token: float

    def tick(self, tokens: int, runs: int, pages: int) -> float:
        return self.fixed_s + self.run_s * runs + self.token_s * tokens + self.page_s * pages


@dataclass(frozen=True, slots=True)
class Demand:
    """What tenants do; nobody measured this. sessions: a tenant's in a day, on average, as a Poisson process
    that follows the hour of the day: ``swing`` 0.8 means 1.8 times the mean at the peak, 0.2 at night. A
    session is ``steps`` steps (geometric mean) of ``tokens`` tokens (lognormal), each sent ``think_s``
    (exponential) after the last was answered."""

    tenants: int = 10_000
    sessions: float = 1.0
    steps: float = 40.0
    tokens: int = 2_048
    think_s: float = 2.0
    swing: float = 0.8

    def scaled(self, load: float) -> Demand:
        """With so many times the sessions."""
        return replace(self, sessions=self.sessions * load)


@dataclass(frozen=True, slots=True)
class Settings:
    """A group's configuration; the defaults are those of config.py but for slots."""

    slots: int = 8
    tick_tokens: int = 16_384
    company_wait_s: float = 0.025


@dataclass(slots=True)
class Outcome:
    """What a simulated group did in a day."""

    busy_s: float = 0.0
    tokens: int = 0
    ticks: int = 0
    runs_in_ticks: int = 0
    pages: int = 0
    sessions: int = 0
    sessions_done: int = 0
    waits: list[float] = field(default_factory=list)


@dataclass(slots=True)
class _Client:
    """One session: a run whose client sends the next step when the last one is answered."""

    run_id: str
    tenant: str
    steps_left: int
    tokens: int
    log: CommandLog[RunCommand]
    sent_at: float = 0.0


class GroupDay:
    """Events of one group until the day is over; what is in flight then does not count."""

    def __init__(self, costs: Costs, demand: Demand, settings: Settings, tenants: int, seed: int) -> None:
        self._costs, self._demand = costs, demand
        self._draw = random.Random(seed)
        self._planner = Planner(
            tick_tokens=settings.tick_tokens,
            max_runs=settings.slots,
            company_wait_s=settings.company_wait_s,
        )
        self._residency = Residency(settings.slots)
        self._events: list[tuple[float, int, Callable[[float], None]]] = []
        self._numbers = itertools.count()
        self._clients: dict[str, _Client] = {}
        self._busy = False
        self._look_at: float | None = None
        self.outcome = Outcome()
        for at in arrivals(self._draw, demand, tenants):
            self._at(at, self._arrive)

    def run(self, until: float = DAY_S) -> Outcome:
        while self._events and self._events[0][0] < until:
            now, _, happen = heapq.heappop(self._events)
            happen(now)
        return self.outcome

    def _at(self, when: float, happen: Callable[[float], None]) -> None:
        heapq.heappush(self._events, (when, next(self._numbers), happen))

    def _arrive(self, now: float) -> None:
        number = next(self._numbers)
        tenant = f"tenant {self._draw.randrange(self._demand.tenants)}"
        # One sigma is a factor of e in both directions.
        tokens = min(16_384, max(64, int(self._demand.tokens * math.exp(self._draw.gauss(-0.5, 1.0)))))
        steps = 1 + int(self._draw.expovariate(1.0) * self._demand.steps)
        client = _Client(f"run {number}", tenant, steps, tokens, CommandLog(math.inf))
        self._clients[client.run_id] = client
        self.outcome.sessions += 1
        self._send(client, now)

    def _send(self, client: _Client, now: float) -> None:
        """A step: forward_backward and optim_step, sent together."""
        client.sent_at = now
        step = PassCommand(b"", (client.tokens,), "cross_entropy", {}, True)
        client.log.append(None, client.run_id, step, now)
        client.log.append(None, client.run_id, _OPTIM, now)
        self._planner.ready(client.tenant, client.run_id, client.log, now)
        if not self._busy:
            self._look(now)

    def _look(self, now: float) -> None:
        """Plan and run a tick, if there is anything to do."""
        if self._busy:
            return
        window = self._planner.next(now)
        if not window.work:
            self._planner.finished(now)
            if window.company_until is not None and window.company_until != self._look_at:
                self._look_at = window.company_until
                self._at(window.company_until, self._look)
            return
        self._busy = True
        placement = self._residency.place([work.run_id for work in window.work])
        pages = len(placement.page_in)
        tokens = sum(num_tokens(entry.command) for work in window.work for entry in work.entries)
        seconds = self._costs.tick(tokens, len(window.work), pages)
        for work in window.work:
            if work.has_pass:
                self.outcome.waits.append(now - self._clients[work.run_id].sent_at)
        self.outcome.busy_s += seconds
        self.outcome.tokens += tokens
        self.outcome.ticks += 1
        self.outcome.runs_in_ticks += len(window.work)
        self.outcome.pages += pages
        self._at(now + seconds, lambda end: self._finish(window, end))

    def _finish(self, window: Window, now: float) -> None:
        self._busy = False
        self._planner.finished(now)
        for work in window.work:
            client = self._clients[work.run_id]
            if client.log.ready:
                continue  # the second half of its step comes with a later tick
            client.steps_left -= 1
            if client.steps_left:
                pause = self._draw.expovariate(1.0 / self._demand.think_s)
                self._at(now + pause, lambda at, c=client: self._send(c, at))
            else:
                del self._clients[client.run_id]
                self._residency.drop(client.run_id)
                self.outcome.sessions_done += 1
        self._look(now)


def arrivals(draw: random.Random, demand: Demand, tenants: int) -> list[float]:
    """When sessions of so many tenants begin in one day: a Poisson process thinned to the hour of the day."""
    peak = tenants * demand.sessions * (1 + demand.swing) / DAY_S
    times, now = [], 0.0
    while peak > 0:
        now += draw.expovariate(peak)
        if now >= DAY_S:
            break
        rate = 1 - demand.swing * math.cos(2 * math.pi * now / DAY_S)
        if draw.random() * (1 + demand.swing) < rate:
            times.append(now)
    return times


def simulate(
    costs: Costs, demand: Demand, groups: int, settings: Settings = Settings(), sampled: int = 1
) -> dict[str, float]:
    """A day of a cluster. Groups are alike, since a new run is put where fewest live: ``sampled`` of them are
    simulated, each with its part of the tenants."""
    tenants = demand.tenants // groups
    number = min(groups, sampled)
    days = [GroupDay(costs, demand, settings, tenants, seed).run() for seed in range(number)]
    waits = [wait for day in days for wait in day.waits]
    tokens = sum(day.tokens for day in days) * groups / number
    ticks = max(1, sum(day.ticks for day in days))
    pages = sum(day.pages for day in days) * groups / number
    return {
        "utilisation": sum(day.busy_s for day in days) / (number * DAY_S),
        "queue p50 s": quantile(waits, 0.5),
        "queue p99 s": quantile(waits, 0.99),
        "runs a tick": sum(day.runs_in_ticks for day in days) / ticks,
        "sessions done": sum(day.sessions_done for day in days) / max(1, sum(day.sessions for day in days)),
        "tokens a day": tokens,
        "adapters paged a day": pages,
        "paging bytes a day": pages * 2 * costs.page_bytes,
        "journal bytes a day": tokens * costs.journal_bytes_per_token,
    }


def run(rows: Rows, budget: Budget, models: Path) -> None:
    from benchmarks.scale_costs import measured

    costs, sources = measured(models, budget)
    groups = GROUPS[:2] if budget.quick else GROUPS
    demand = Demand(tenants=200) if budget.quick else Demand()
    # Arrivals are set so that half of the largest cluster would be busy all day.
    busy = 0.002 if budget.quick else 0.5
    demand = demand.scaled(load_for(costs, demand, busy * max(groups)))
    note = "; ".join(f"{name} = {value:.3g} ({source})" for name, value, source in sources)
    print(f"  assumptions: {demand}; {note}")
    for count in groups:
        if budget.left_s < 0 and count > groups[0]:
            rows.skip(f"{count} groups, a day on paper", "the part's time is over")
            continue
        found = simulate(costs, demand, count)
        rows.add(
            f"{count} groups, {demand.tenants:,} tenants, a day on paper: utilisation",
            found["utilisation"],
            "",
            note=in_words(found),
            detail=found | {"assumptions": [list(source) for source in sources], "demand": str(demand)},
        )


def in_words(found: dict[str, float]) -> str:
    gigabytes = {what: found[f"{what} bytes a day"] / 1e9 for what in ("paging", "journal")}
    return (
        f"queue p50 {found['queue p50 s']:.3g} s, p99 {found['queue p99 s']:.3g} s; a day: paging "
        f"{gigabytes['paging']:.3g} GB, journal {gigabytes['journal']:.3g} GB, "
        f"{found['sessions done']:.0%} of the sessions done"
    )


def load_for(costs: Costs, demand: Demand, busy_groups: float, runs_a_tick: float = 4.0) -> float:
    """How many times the sessions keep about so many groups busy, if so many runs share a tick."""
    a_step = costs.fixed_s / runs_a_tick + costs.run_s + costs.token_s * demand.tokens
    steps_a_day = demand.tenants * demand.sessions * demand.steps
    return busy_groups * DAY_S / (steps_a_day * a_step)


def show(found: Sequence[tuple[int, dict[str, float]]]) -> str:
    lines = [f"{'groups':>8}" + "".join(f"{name:>22}" for name in found[0][1])]
    lines += [f"{count:>8}" + "".join(f"{value:>22.4g}" for value in of.values()) for count, of in found]
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", type=Path, default=Path("models"))
    parser.add_argument("--busy-groups", type=float, default=32.0, help="what the tenants together keep busy")
    for name, value in _defaults(Demand()).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(value), default=value)
    options = parser.parse_args(arguments)
    from benchmarks.scale_costs import measured

    costs, sources = measured(options.models, Budget.of(60, False))
    for name, value, source in sources:
        print(f"{name:>26} = {value:<10.4g} {source}")
    demand = Demand(**{name: getattr(options, name) for name in _defaults(Demand())})
    demand = demand.scaled(load_for(costs, demand, options.busy_groups))
    print(demand)
    print(show([(count, simulate(costs, demand, count)) for count in GROUPS]))


def _defaults(demand: Demand) -> dict[str, Any]:
    return {name: getattr(demand, name) for name in demand.__dataclass_fields__}


if __name__ == "__main__":
    main()
