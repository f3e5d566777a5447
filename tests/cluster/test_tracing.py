"""Spans as an OpenTelemetry collector gets them: over HTTP, in OTLP, with their parents."""

from __future__ import annotations

import gzip
import sys
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from twinkle_serve.cluster.tracing import span_exporter
from twinkle_serve.control.spans import Span

PARENT = f"00-{'ab' * 16}-{'cd' * 8}-01"
OWN = f"00-{'ab' * 16}-{'ef' * 8}-01"


@contextmanager
def collector() -> Iterator[tuple[str, Future[Any]]]:
    """A collector that takes one request."""
    received: Future[Any] = Future()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            if self.headers.get("content-encoding") == "gzip":
                body = gzip.decompress(body)
            self.send_response(200)
            self.end_headers()
            if not received.done():
                received.set_result(ExportTraceServiceRequest.FromString(body))

        def log_message(self, *arguments: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/v1/traces", received
        server.shutdown()


def test_spans_arrive_with_times_parents_and_attributes() -> None:
    with collector() as (url, received):
        export = span_exporter(url, "coordinator")
        assert export is not None
        export(Span("GET /x", 1.0, 2.5, frozenset(), "gateway", {"status": 200}, (PARENT,), OWN))
        export(Span("passes", 1.25, 1.5, frozenset(["s"]), "ticks base", {"tick": 7}, (OWN, PARENT)))
        export(Span("optim", 3.0, 4.0, frozenset(["s"]), "ticks base"))
        message = received.result(30)
    (resource,) = message.resource_spans
    attributes = {item.key: item.value.string_value for item in resource.resource.attributes}
    assert attributes["service.name"] == "twinkle-serve"
    assert attributes["twinkle.component"] == "coordinator"
    request, first, second, alone = (span for scope in resource.scope_spans for span in scope.spans)
    assert request.name == "GET /x"
    assert request.trace_id.hex() == "ab" * 16
    assert (request.parent_span_id.hex(), request.span_id.hex()) == ("cd" * 8, "ef" * 8)
    assert request.start_time_unix_nano == 1_000_000_000
    assert request.end_time_unix_nano == 2_500_000_000
    # A tick works for several requests: its phases are in the trace of each.
    assert [first.parent_span_id.hex(), second.parent_span_id.hex()] == ["ef" * 8, "cd" * 8]
    assert {item.key: item.value.int_value for item in first.attributes}["twinkle.tick"] == 7
    assert not alone.parent_span_id
    assert alone.trace_id.hex() != "ab" * 16


def test_without_an_endpoint_there_is_no_exporter() -> None:
    assert span_exporter(None, "x") is None


def test_a_missing_exporter_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry.exporter.otlp.proto.http.trace_exporter", None)
    with pytest.raises(ValueError, match=r"twinkle-serve\[otel\]"):
        span_exporter("http://127.0.0.1:1/v1/traces", "x")
