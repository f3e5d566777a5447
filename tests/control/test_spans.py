"""Spans in memory and as a Chrome trace."""

from __future__ import annotations

from twinkle_serve.control.spans import Span, Spans, chrome_trace


def span(name: str, session: str, start: float = 1.0, end: float = 2.0, track: str = "ticks base") -> Span:
    return Span(name, start, end, frozenset([session]), track, {"tick": 1})


def test_a_session_sees_its_own_spans_only() -> None:
    spans = Spans()
    spans.add(span("passes", "s1"))
    spans.add(span("optim", "s2"))
    spans.add(Span("shared", 0, 1, frozenset(["s1", "s2"]), "ticks base"))
    assert [s.name for s in spans.of_session("s1")] == ["passes", "shared"]
    assert spans.of_session("s3") == []


def test_the_oldest_spans_go() -> None:
    spans = Spans(most=2)
    for name in "abc":
        spans.add(span(name, "s"))
    assert [s.name for s in spans.of_session("s")] == ["b", "c"]


def test_every_span_is_exported() -> None:
    exported: list[Span] = []
    spans = Spans(most=1, export=exported.append)
    spans.add(span("a", "s"))
    spans.add(span("b", "s"))
    assert [s.name for s in exported] == ["a", "b"]


def test_a_trace_has_named_tracks_and_microseconds() -> None:
    trace = chrome_trace([span("passes", "s", 1.5, 1.75), span("waiting", "s", 1.0, 1.0, "requests r")])
    names = [event["args"]["name"] for event in trace["traceEvents"] if event["ph"] == "M"]
    passes, waiting = (event for event in trace["traceEvents"] if event["ph"] == "X")
    assert names == ["ticks base", "requests r"]
    assert (passes["ts"], passes["dur"]) == (1_500_000, 250_000)
    assert waiting["dur"] == 1  # a viewer does not show what takes no time
    assert passes["tid"] != waiting["tid"]
    assert passes["args"] == {"tick": 1}


def test_an_empty_trace_is_a_trace() -> None:
    assert chrome_trace([])["traceEvents"] == []
