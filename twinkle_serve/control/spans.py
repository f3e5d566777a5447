"""What took how long, as spans: the last ones in memory, and a Chrome trace made from some of them.

Knows names, times and whose they are. Does not know who measures, or where else spans are sent.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

MAX_SPANS = 20_000
# The W3C traceparent of the request that this task works for, if the caller sent or made one.
TRACE_PARENT: ContextVar[str | None] = ContextVar("trace_parent", default=None)


@dataclass(frozen=True, slots=True)
class Span:
    """start, end: POSIX seconds. sessions: whose trace it is part of. track: the line it is drawn on.
    args: plain values, never keys of users. parents: W3C traceparents of what this was done for. own: this
    span's traceparent, where others refer to it."""

    name: str
    start: float
    end: float
    sessions: frozenset[str]
    track: str
    args: Mapping[str, str | float] = field(default_factory=dict)
    parents: tuple[str, ...] = ()
    own: str | None = None


class Spans:
    """The newest spans. ``export`` gets each one, too."""

    def __init__(self, most: int = MAX_SPANS, export: Callable[[Span], object] | None = None) -> None:
        self._ring: deque[Span] = deque(maxlen=most)
        self.export = export

    def add(self, span: Span) -> None:
        self._ring.append(span)
        if self.export is not None:
            self.export(span)

    def of_session(self, session_id: str) -> list[Span]:
        return [span for span in self._ring if session_id in span.sessions]


def chrome_trace(spans: Iterable[Span]) -> dict[str, Any]:
    """Trace Event Format: open it in Perfetto or chrome://tracing. Times are microseconds."""
    tracks: dict[str, int] = {}
    events: list[dict[str, Any]] = []
    for span in spans:
        if span.track not in tracks:
            number = tracks[span.track] = len(tracks) + 1
            name = {"name": "thread_name", "ph": "M", "pid": 1, "tid": number, "args": {"name": span.track}}
            events.append(name)
        events.append(
            {
                "name": span.name,
                "cat": span.track.partition(" ")[0],
                "ph": "X",
                "pid": 1,
                "tid": tracks[span.track],
                "ts": round(span.start * 1e6),
                "dur": max(1, round((span.end - span.start) * 1e6)),
                "args": dict(span.args),
            }
        )
    return {"traceEvents": events, "displayTimeUnit": "ms"}
