"""What a run or session looked like: a trace to download, and numbers that a program adds to its curves.

Knows the JSON of both and their limits. Does not know where spans and curves are kept.
"""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Query, Request
from pydantic import Field
from starlette.responses import Response

from twinkle_serve.gateway.context import Authenticated, gateway_of
from twinkle_serve.gateway.http import describes, no_content, reply
from twinkle_serve.gateway.links import resource_path
from twinkle_serve.protocol.errors import UserError
from twinkle_serve.protocol.losses import as_finite
from twinkle_serve.protocol.requests import Lenient, read
from twinkle_serve.protocol.showing import shown

router = APIRouter(tags=["insights"])
MAX_VALUES = 32
MAX_NAME = 64

Text = Annotated[str, Query(max_length=200)]
Expires = Annotated[int, Query(ge=0, lt=2**40)]


class ReportedMetrics(Lenient):
    """step: where on the x axis; left out, the run's last optimizer step. metrics: finite numbers by name."""

    step: float | None = Field(None, ge=0, le=1e15, allow_inf_nan=False)
    metrics: dict[str, Any]

    def values(self) -> dict[str, float]:
        """Raises UserError, naming the field and the limit."""
        if not 1 <= len(self.metrics) <= MAX_VALUES:
            raise UserError(f"metrics has {len(self.metrics)} names; 1 to {MAX_VALUES} are accepted")
        found = {}
        for name, value in self.metrics.items():
            if not 1 <= len(name) <= MAX_NAME or not name.isprintable():
                raise UserError(f"metrics: the name {name!r:.80} is not 1 to {MAX_NAME} printable characters")
            number = as_finite(value)
            if number is None:
                raise UserError(f"metrics.{name} must be a finite number, not {shown(value)}")
            found[name] = number
        return found


@router.post("/training_runs/{run_id}/metrics", openapi_extra=describes(ReportedMetrics))
async def report_metrics(run_id: str, request: Request, call: Authenticated) -> Response:
    """Draw these numbers beside the run's loss: a reward, an evaluation."""
    body = read(ReportedMetrics, await call.object(request))
    await call.backend.report_metrics(call.tenant, run_id, body.step, body.values())
    return no_content()


@router.get("/sessions/{session_id}/trace_export")
async def trace_export(session_id: str, request: Request, call: Authenticated) -> Response:
    """Where the trace of the session's last requests is, for a while. It is made when it is fetched."""
    await call.backend.get_session(call.tenant, session_id)
    resource = resource_path("sessions", session_id, "trace")
    query, _ = call.gateway.links.sign(call.tenant, resource)
    base = (call.gateway.config.http.public_url or str(request.base_url)).rstrip("/")
    return reply({"status": "ready", "url": f"{base}/api/v1/{resource}?{query}"})


@router.get("/sessions/{session_id}/trace")
async def trace(session_id: str, request: Request, tenant: Text, expires: Expires, token: Text) -> Response:
    """In Trace Event Format: open it in Perfetto or chrome://tracing. The link is the key."""
    gateway = gateway_of(request)
    gateway.links.check(tenant, resource_path("sessions", session_id, "trace"), expires, token)
    return reply(await gateway.backend_provider().session_trace(tenant, session_id))
