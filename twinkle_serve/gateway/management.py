"""Copies of checkpoints, projects, search, bills and the audit log.

Knows the wire's forms of what is asked. Each caller sees what is its own: there are no other roles. Does not
know what was counted, or how.
"""

from __future__ import annotations

from datetime import date
from typing import Annotated

from fastapi import APIRouter, Header, Query, Request
from pydantic import AwareDatetime
from starlette.responses import Response

from twinkle_serve.control.backend import SessionQuery
from twinkle_serve.gateway.context import Authenticated
from twinkle_serve.gateway.http import describes, no_content, reply
from twinkle_serve.protocol.errors import UserError
from twinkle_serve.protocol.paths import parse_path
from twinkle_serve.protocol.requests import AssignProject, CopyWeights, SearchSessions, read

router = APIRouter(tags=["management"])
_HOUR_S, _MAX_DAYS = 3600, 14
ProjectId = Annotated[str | None, Query(max_length=128)]


@router.post("/copy_weights", openapi_extra=describes(CopyWeights))
async def copy_weights(
    request: Request, call: Authenticated, x_idempotency_key: Annotated[str, Header(max_length=200)] = ""
) -> Response:
    """The SDK sends one idempotency key with all its attempts at one copy."""
    body = read(CopyWeights, await call.object(request))
    place = None
    if body.session_id is not None:
        if body.model_seq_id is None or body.destination_project_id is not None:
            raise UserError("copy_weights needs destination_project_id, or session_id and model_seq_id")
        place = body.session_id, body.model_seq_id
    path = await call.backend.copy_checkpoint(
        call.tenant,
        str(parse_path(body.source_path)),
        place,
        body.destination_project_id,
        body.ttl_seconds,
        x_idempotency_key,
    )
    return reply({"tinker_path": path})


@router.put("/sessions/{session_id}/project", openapi_extra=describes(AssignProject))
async def assign_project(session_id: str, request: Request, call: Authenticated) -> Response:
    body = read(AssignProject, await call.object(request))
    await call.backend.assign_project(call.tenant, session_id, body.project_id)
    return no_content()


@router.post("/sessions/search", openapi_extra=describes(SearchSessions))
async def search_sessions(request: Request, call: Authenticated) -> Response:
    body = read(SearchSessions, await call.object(request))
    statuses = None
    if body.statuses is not None:
        statuses = tuple((s.type, None if s.reasons is None else tuple(s.reasons)) for s in body.statuses)
    cursor = body.cursor
    query = SessionQuery(
        session_id=body.session_id,
        project_ids=None if body.project_ids is None else tuple(body.project_ids),
        user_metadata=body.user_metadata,
        display_name=body.display_name,
        owners=tuple(body.owner.owner_urns) if body.owner.type == "user" else None,
        statuses=statuses,
        limit=body.limit,
        after=None
        if cursor is None
        else (round(cursor.last_created_at.timestamp(), 6), cursor.last_session_id),
    )
    found, following = await call.backend.search_sessions(call.tenant, query)
    return reply({"sessions": found} | ({"next_cursor": following} if following else {}))


@router.get("/billing/usage/events")
async def usage_events(
    call: Authenticated, starting_on: AwareDatetime, ending_before: AwareDatetime
) -> Response:
    """Tokens, checkpoints and storage by the hour, as counted; there are no prices here."""
    since, until = starting_on.timestamp(), ending_before.timestamp()
    if since % _HOUR_S or until % _HOUR_S:
        raise UserError("starting_on and ending_before must be whole hours (UTC)")
    if not 0 < until - since <= _MAX_DAYS * 24 * _HOUR_S:
        raise UserError(f"ending_before must be at most {_MAX_DAYS} days after starting_on")
    return reply(await call.backend.bill(call.tenant, since, until))


@router.get("/billing/usage/checkpoints/current")
async def checkpoint_storage(call: Authenticated, project_id: ProjectId = None) -> Response:
    return reply(await call.backend.checkpoint_storage(call.tenant, project_id))


@router.get("/audit")
async def audit(
    call: Authenticated,
    day: date | None = None,
    event_type: Annotated[str, Query(max_length=64)] = "all",
) -> Response:
    """What was done to the caller's checkpoints on a day."""
    shown = None if day is None else day.isoformat()
    return reply({"entries": await call.backend.audit(call.tenant, shown, event_type)})
