"""Spans to an OpenTelemetry collector, by OTLP over HTTP.

Knows the OpenTelemetry SDK, which is only imported when an endpoint is configured. Does not know what the
spans are about (control/spans.py).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from twinkle_serve import __version__
from twinkle_serve.control.spans import Span


def span_exporter(endpoint: str | None, component: str) -> Callable[[Span], None] | None:
    """A function that sends spans in the background, or None without an endpoint.

    Raises ValueError if the exporter is not installed (``pip install twinkle-serve[otel]``).
    """
    if endpoint is None:
        return None
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    except ImportError:
        raise ValueError(
            "monitoring.otlp_endpoint needs the OpenTelemetry exporter: pip install 'twinkle-serve[otel]'"
        ) from None
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    resource = Resource.create(
        {"service.name": "twinkle-serve", "service.version": __version__, "twinkle.component": component}
    )
    processor = BatchSpanProcessor(OTLPSpanExporter(endpoint=endpoint))

    def export(span: Span) -> None:
        for parent in span.parents or (None,):
            processor.on_end(readable(span, parent, resource))

    return export


def readable(span: Span, parent: str | None, resource: Any) -> Any:
    """The span as OpenTelemetry's: in the trace of ``parent`` (a W3C traceparent), or in one of its own."""
    from opentelemetry.sdk.trace import ReadableSpan
    from opentelemetry.sdk.trace.id_generator import RandomIdGenerator
    from opentelemetry.trace import SpanContext, TraceFlags

    sampled = TraceFlags(TraceFlags.SAMPLED)
    ids = RandomIdGenerator()
    above = None
    if parent is not None:
        _, trace, above_id, _ = parent.split("-")
        above = SpanContext(int(trace, 16), int(above_id, 16), is_remote=True, trace_flags=sampled)
    if span.own is not None:
        _, own_trace, own_id, _ = span.own.split("-")
        context = SpanContext(int(own_trace, 16), int(own_id, 16), is_remote=False, trace_flags=sampled)
    else:
        trace_id = above.trace_id if above is not None else ids.generate_trace_id()
        context = SpanContext(trace_id, ids.generate_span_id(), is_remote=False, trace_flags=sampled)
    return ReadableSpan(
        name=span.name,
        context=context,
        parent=above,
        resource=resource,
        attributes={f"twinkle.{name}": value for name, value in {**span.args, "track": span.track}.items()},
        start_time=round(span.start * 1e9),
        end_time=round(span.end * 1e9),
    )
