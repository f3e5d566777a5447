"""Watches the work go by: counters and times for operators, curves for a run's owner, spans for both.

Knows what a request is, when it came, when a tick took it and how it ended. Decides nothing: with every
method of it empty the service would answer the same.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from itertools import takewhile
from typing import Any

from twinkle_serve.control.backend import (
    LoadCommand,
    OptimCommand,
    PassCommand,
    SaveCommand,
    SnapshotCommand,
    UnloadCommand,
)
from twinkle_serve.control.clock import Clock
from twinkle_serve.control.commands import BirthCommand, RestoreCommand, RunCommand, num_tokens
from twinkle_serve.control.history import Histories
from twinkle_serve.control.metrics import Meter, Silent, TenantLabels, tenant_hash
from twinkle_serve.control.planner import Window
from twinkle_serve.control.spans import TRACE_PARENT, Span, Spans
from twinkle_serve.protocol.data import SampleResult
from twinkle_serve.protocol.work import Failure, ModelInfo, Outcome, Tick, TickReport

logger = logging.getLogger(__name__)
_RECENT_TICKS = 32
_RECENT_RECOVERIES = 20
_STALE_S = 3600.0


@dataclass(slots=True)
class _Request:
    """seq_id: within the run. taken_at: by a tick, None before."""

    tenant: str
    owner: str
    session: str
    accepted_at: float
    seq_id: int | None = None
    group: str = ""  # that took it
    is_answered: bool = False
    kind: str = ""
    tokens: int = 0
    learning_rate: float = 0.0
    taken_at: float | None = None
    parent: str | None = None


@dataclass(slots=True)
class _Running:
    tick: Tick
    started_at: float
    sessions: frozenset[str]
    num_runs: int
    tokens: dict[str, int]
    parents: tuple[str, ...]


@dataclass(slots=True)
class _Pace:
    """How fast one group has been: (seconds, runs served, samples finished) of its last ticks that worked."""

    info: ModelInfo
    tick_tokens: int
    num_ranks: int = 1
    recent: deque[tuple[float, int, int]] = field(default_factory=lambda: deque(maxlen=_RECENT_TICKS))
    num_samples: int = 0
    pass_seconds: float = 0.0
    flops: float = 0.0
    num_ticks: int = 0
    running: _Running | None = None
    recoveries: deque[float] = field(default_factory=lambda: deque(maxlen=_RECENT_RECOVERIES))
    tenant_tokens: dict[str, int] = field(default_factory=dict)


class Watch:
    """One per control plane. Everything runs on its event loop."""

    def __init__(self, clock: Clock, meter: Meter | None = None) -> None:
        self.meter: Meter = meter or Silent()
        self.histories = Histories()
        self.spans = Spans()
        self._clock = clock
        self._requests: dict[str, _Request] = {}
        # Samples that were cancelled, and when: their group has yet to say how far they had come.
        self._cancelled: dict[str, tuple[float, _Request]] = {}
        self._paces: dict[str, _Pace] = {}
        self._tenants = TenantLabels()
        # Also told of tokens: tenant, session or "", base model, kind, number.
        self.used: Callable[[str, str, str, str, int], None] = lambda *_: None

    def add_group(self, group: str, info: ModelInfo, tick_tokens: int, num_ranks: int) -> None:
        """group: its name, which is its base model's only where that has one group. It is what the label
        ``model`` of the metrics says."""
        self._paces.setdefault(group, _Pace(info, tick_tokens, num_ranks))
        self.meter.add("recoveries", 0, model=group)

    # requests -------------------------------------------------------------------------------------

    def accepted(self, request_id: str, tenant: str, origin: tuple[str, str, int | None]) -> None:
        """origin: ("run" or "sampler", its id, seq_id) or ("model", base model, None)."""
        kind, owner, seq_id = origin
        session = session_of(owner) if kind != "model" else ""
        parent = TRACE_PARENT.get()
        now = self._clock.now()
        self._requests[request_id] = _Request(tenant, owner, session, now, seq_id, parent=parent)

    def accepted_at(self, request_id: str) -> float | None:
        request = self._requests.get(request_id)
        return None if request is None else request.accepted_at

    def seq_id_of(self, request_id: str) -> int | None:
        request = self._requests.get(request_id)
        return None if request is None else request.seq_id

    def is_running(self, request_id: str) -> bool:
        """Whether a tick has taken it."""
        request = self._requests.get(request_id)
        return request is not None and request.taken_at is not None

    def result(self, outcome: Outcome, is_awaited: bool = True) -> None:
        """What the group answered, before its promise is settled; of a sample that was cancelled after.
        is_awaited: whether that is still to come. What is merely done again is not counted again."""
        _, cancelled = self._cancelled.pop(outcome.request_id, (0.0, None))
        request = cancelled or self._requests.get(outcome.request_id)
        if request is None:
            return
        request.is_answered = True
        numbers = {**outcome.metrics, **summary_of(outcome.value)}
        if outcome.failure is not None:
            if request.kind == "sample":  # the model worked for it all the same
                self._count_tokens(request, "prompt", int(numbers.get("prompt_tokens", 0)))
                self._count_tokens(request, "sampled", int(numbers.get("sampled_tokens", 0)))
            return
        match request.kind:
            case "forward" | "forward_backward":
                backward = request.kind == "forward_backward"
                history = self.histories.of(request.owner)
                history.add_pass(request.seq_id or 0, numbers, request.tokens, backward)
                if is_awaited:
                    self._count_tokens(request, "train" if backward else "forward", request.tokens)
            case "optim_step":
                history = self.histories.of(request.owner)
                history.add_step(request.seq_id or 0, self._clock.now(), request.learning_rate, numbers)
                if is_awaited:
                    self.meter.add("optimizer_steps", 1, model=request.group)
            case "sample":
                self._paces[request.group].num_samples += 1
                self._count_tokens(request, "prompt", request.tokens)
                self._count_tokens(request, "sampled", int(numbers.get("sampled_tokens", 0)))

    def settled(self, request_id: str, failure: Failure | None) -> None:
        """However it ended: also without having been in a tick."""
        request = self._requests.pop(request_id, None)
        if request is None:
            return
        now = self._clock.now()
        if request.kind == "sample" and not request.is_answered:
            self._cancelled[request_id] = now, request
        kind, group = request.kind or "rejected", request.group
        result = "done" if failure is None else f"{failure.category}_error"
        self.meter.add("requests", 1, model=group, kind=kind, result=result)
        self.meter.observe("request_seconds", now - request.accepted_at, model=group, kind=kind)
        sessions = frozenset([request.session])
        args: dict[str, str | float] = {"request": request_id, "result": result}
        if request.seq_id is not None:
            args["seq_id"] = request.seq_id
        if request.tokens:
            args["tokens"] = request.tokens
        taken = request.taken_at if request.taken_at is not None else now
        track = f"requests {request.owner}"
        parents = () if request.parent is None else (request.parent,)
        self.spans.add(Span("waiting", request.accepted_at, taken, sessions, track, args, parents))
        if request.taken_at is not None:
            self.spans.add(Span(kind, taken, now, sessions, track, args, parents))
        level = logging.DEBUG if failure is None else logging.INFO
        extra = {
            "tenant": tenant_hash(request.tenant),
            "run": request.owner,
            "seq": request.seq_id,
            "request": request_id,
        }
        logger.log(level, "%s: %s", kind, failure.message if failure else "done", extra=extra)

    def forget_stale(self, is_pending: Callable[[str], bool]) -> None:
        """Drop what was lost without an answer."""
        limit = self._clock.now() - _STALE_S
        # The oldest come first, and there may be very many.
        old = takewhile(lambda item: item[1].accepted_at < limit, self._requests.items())
        for request_id in [request_id for request_id, _ in old]:
            if not is_pending(request_id):
                del self._requests[request_id]
        for request_id in [key for key, (at, _) in self._cancelled.items() if at < limit]:
            del self._cancelled[request_id]

    # ticks ----------------------------------------------------------------------------------------

    def tick_began(self, group: str, tick: Tick, window: Window) -> None:
        now = self._clock.now()
        tokens = {"forward": 0, "forward_backward": 0}
        sessions: set[str] = set()
        parents: set[str] = set()
        for work in window.work:
            sessions.add(session_of(work.run_id))
            for entry in work.entries:
                request = self._taken(entry.request_id, work.tenant, work.run_id, group, now)
                request.seq_id, request.kind = entry.seq_id, kind_of(entry.command)
                request.tokens = num_tokens(entry.command)
                if isinstance(entry.command, OptimCommand):
                    request.learning_rate = entry.command.params.learning_rate
                if request.kind in tokens:
                    tokens[request.kind] += request.tokens
                self._waited(request, now)
                parents.update(filter(None, [request.parent]))
        for sample in tick.samples:
            request = self._taken(sample.request_id, sample.tenant, "", group, now)
            request.kind, request.tokens = "sample", len(sample.request.prompt)
            sessions.add(request.session)
            self._waited(request, now)
            parents.update(filter(None, [request.parent]))
        num_runs = sum(work.has_pass for work in window.work)
        self._paces[group].running = _Running(
            tick, now, frozenset(sessions - {""}), num_runs, tokens, tuple(sorted(parents))
        )

    def tick_ended(self, group: str, report: TickReport) -> None:
        pace = self._paces[group]
        running, pace.running = pace.running, None
        if running is None:
            return
        now = self._clock.now()
        seconds = now - running.started_at
        self.meter.observe("tick_seconds", seconds, model=group)
        for phase, value in report.seconds.items():
            self.meter.observe("step_seconds", value, model=group, phase=phase)
        num_tokens = sum(running.tokens.values())
        if running.num_runs:
            self.meter.observe("tick_fill_ratio", num_tokens / pace.tick_tokens, model=group)
            self.meter.observe("tick_runs", running.num_runs, model=group)
            work = 4 * running.tokens["forward_backward"] + 2 * running.tokens["forward"]
            pace.flops += work * pace.info.active_parameters
            pace.pass_seconds += report.seconds.get("passes", 0.0)
        if running.num_runs or pace.num_samples:
            pace.recent.append((seconds, running.num_runs, pace.num_samples))
            pace.num_samples = 0
        pace.num_ticks += 1
        self._trace(group, running, report)

    def tick_lost(self, group: str) -> None:
        """The group died in the middle of it."""
        self._paces[group].running = None
        self._paces[group].recoveries.append(self._clock.now())
        self.meter.add("recoveries", 1, model=group)

    def _trace(self, group: str, running: _Running, report: TickReport) -> None:
        """The phases follow each other in the order in which the report names them."""
        if not running.sessions and not running.parents:
            return
        start = running.started_at
        for phase, value in report.seconds.items():
            if value > 1e-5:
                args: dict[str, str | float] = {"tick": report.tick_id}
                track = f"ticks {group}"
                span = Span(phase, start, start + value, running.sessions, track, args, running.parents)
                self.spans.add(span)
            start += value

    # what it knows --------------------------------------------------------------------------------

    def mfu(self, group: str) -> float | None:
        """Since the last call; None without passes or without a known peak."""
        pace = self._paces[group]
        possible = pace.pass_seconds * pace.info.peak_flops * pace.num_ranks
        done, pace.flops, pace.pass_seconds = pace.flops, 0.0, 0.0
        return done / possible if possible > 0 and done > 0 else None

    def recoveries(self, group: str) -> list[float]:
        """When the last ones began, POSIX seconds."""
        return list(self._paces[group].recoveries)

    def tenant_tokens(self, group: str) -> dict[str, int]:
        """All tokens so far, by the tenant's label."""
        return dict(self._paces[group].tenant_tokens)

    def num_ticks(self, group: str) -> int:
        return self._paces[group].num_ticks

    def seconds_per_run(self, group: str) -> float | None:
        """How long one run's turn has been taking, sharing considered; None while nothing is known."""
        return _seconds_each((seconds, runs) for seconds, runs, _ in self._paces[group].recent)

    def seconds_per_sample(self, group: str) -> float | None:
        return _seconds_each((seconds, samples) for seconds, _, samples in self._paces[group].recent)

    # helpers --------------------------------------------------------------------------------------

    def _taken(self, request_id: str, tenant: str, owner: str, group: str, now: float) -> _Request:
        request = self._requests.get(request_id)
        if request is None:  # done again after a failure, or from the journal of an earlier life
            request = _Request(tenant, owner, session_of(owner), now)
            self._requests[request_id] = request
        request.group, request.taken_at = group, now
        return request

    def _waited(self, request: _Request, now: float) -> None:
        waited = now - request.accepted_at
        self.meter.observe("queue_seconds", waited, model=request.group, kind=request.kind)

    def _count_tokens(self, request: _Request, kind: str, amount: int) -> None:
        pace = self._paces[request.group]
        self.used(request.tenant, request.session, pace.info.name, kind, amount)
        tenant = self._tenants.of(request.tenant)
        by_tenant = pace.tenant_tokens
        by_tenant[tenant] = by_tenant.get(tenant, 0) + amount
        self.meter.add("tokens", amount, model=request.group, kind=kind, tenant=tenant)


def session_of(owner: str) -> str:
    """The session in the id of a run or a sampler."""
    return owner.partition(":")[0]


def kind_of(command: RunCommand) -> str:
    match command:
        case PassCommand(backward=backward):
            return "forward_backward" if backward else "forward"
        case OptimCommand():
            return "optim_step"
        case SaveCommand():
            return "save"
        case SnapshotCommand():
            return "snapshot"
        case BirthCommand(path=None):
            return "create"
        case BirthCommand() | LoadCommand():
            return "load"
        case UnloadCommand():
            return "unload"
        case RestoreCommand():
            return "restore"
    return "rejected"


def summary_of(value: Any) -> Mapping[str, float]:
    """The numbers in a result that are worth keeping when the result itself stays elsewhere."""
    if isinstance(value, SampleResult):
        return {"sampled_tokens": float(sum(len(sequence.tokens) for sequence in value.sequences))}
    found = value if isinstance(value, Mapping) else getattr(value, "metrics", {})
    return {name: float(number) for name, number in found.items() if isinstance(number, int | float)}


def _seconds_each(recent: Iterable[tuple[float, int]]) -> float | None:
    total, count = 0.0, 0
    for seconds, number in recent:
        total, count = total + seconds, count + number
    return total / count if count else None
