"""Sessions: what a client opens first, keeps alive by heartbeats and finishes.

Knows the JSON of sessions. Does not know when one expires.
"""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Query, Request
from starlette.responses import Response

from twinkle_serve.gateway.context import Authenticated
from twinkle_serve.gateway.http import describes, no_content, reply
from twinkle_serve.protocol.errors import Expired
from twinkle_serve.protocol.requests import (
    CreateSession,
    FinishSession,
    Heartbeat,
    as_strings,
    read,
)

router = APIRouter(tags=["sessions"])

Limit = Annotated[int, Query(ge=0, le=1000)]
Offset = Annotated[int, Query(ge=0, lt=2**31)]


@router.post("/create_session", openapi_extra=describes(CreateSession))
async def create_session(request: Request, call: Authenticated) -> Response:
    body = read(CreateSession, await call.object(request))
    info = body.model_dump() | {"user_metadata": as_strings(body.user_metadata)}
    return reply({"session_id": await call.backend.create_session(call.tenant, info)})


@router.post("/session_heartbeat", openapi_extra=describes(Heartbeat))
async def heartbeat(request: Request, call: Authenticated) -> Response:
    body = read(Heartbeat, await call.object(request))
    if not await call.backend.heartbeat(call.tenant, body.session_id):
        raise Expired(f"session {body.session_id!r:.80} is over")
    return reply({"type": "session_heartbeat"})


@router.get("/sessions")
async def list_sessions(call: Authenticated, limit: Limit = 20, offset: Offset = 0) -> Response:
    return reply({"sessions": await call.backend.list_sessions(call.tenant, limit, offset)})


@router.get("/sessions/{session_id}")
async def get_session(session_id: str, call: Authenticated) -> Response:
    return reply(await call.backend.get_session(call.tenant, session_id))


@router.post("/sessions/{session_id}/finish", openapi_extra=describes(FinishSession))
async def finish_session(session_id: str, request: Request, call: Authenticated) -> Response:
    body = read(FinishSession, await call.object(request))
    reason = body.reason | ({"detail": body.detail} if body.detail else {})
    await call.backend.finish_session(call.tenant, session_id, reason)
    return no_content()
