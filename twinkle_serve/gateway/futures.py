"""Long polls for promises.

The SDK repeats a poll for one promise at once and for ever on 408 and on any 5xx, gives up on most other
statuses, and takes an ``error`` key for a final failure. So that route answers 200, 408, 404, 410 or 401 and
nothing else, and holds "not ready" for as long as the client's patience allows.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping
from functools import partial

from fastapi import APIRouter, Request
from starlette.responses import Response

from twinkle_serve.control.backend import SAMPLING_ID_PREFIX, Poll
from twinkle_serve.gateway.context import Authenticated, Call, authenticated
from twinkle_serve.gateway.http import describes, refusal, reply
from twinkle_serve.protocol.errors import Absent, BackendUnavailable, Busy, Lost, UserError, WireError
from twinkle_serve.protocol.requests import RequestId, RetrieveFutures, read
from twinkle_serve.protocol.results import encode_result, num_cells
from twinkle_serve.protocol.work import Failure

logger = logging.getLogger(__name__)
router = APIRouter(tags=["futures"])

# Time between the end of the hold and the end of the client's patience.
_MARGIN_S = 10.0
# A client would ask again at once while the control plane is away.
UNAVAILABLE_WAIT_S = 1.0


@router.post("/retrieve_future", openapi_extra=describes(RequestId))
async def retrieve_future(request: Request) -> Response:
    """Protobuf or JSON, told by Accept. Never a 5xx, which the SDK would repeat without a pause."""
    request_id = ""
    try:
        async with authenticated(request) as call:
            body = await call.object(request)
            given = body.get("request_id")
            request_id = given if isinstance(given, str) else ""
            return await _poll(call, request_id, request.headers)
    except Busy as error:
        await asyncio.sleep(UNAVAILABLE_WAIT_S)
        return _try_again(request_id, error.queue_state, str(error))
    except BackendUnavailable as error:
        await asyncio.sleep(UNAVAILABLE_WAIT_S)
        return _try_again(request_id, "active", str(error))
    except WireError as error:
        return refusal(error.status, str(error))
    except Exception:
        logger.exception("poll for %s failed", request_id)
        return failed(Failure("the server could not produce this result", "server"))


@router.post("/retrieve_futures", openapi_extra=describes(RetrieveFutures))
async def retrieve_futures(request: Request, call: Authenticated) -> Response:
    """One poll for all samples of a sampling client: which have ended. Each result is fetched by itself."""
    body = read(RetrieveFutures, await call.object(request))
    hold = hold_seconds(request.headers, call.gateway.config.http.poll_hold_s)
    found = await call.backend.poll_samples(
        call.tenant,
        body.target.sampling_session_id,
        body.target.cloned_sampler_id,
        body.prev_cursor,
        hold if body.timeout is None else min(hold, body.timeout),
    )
    if found is None:
        raise Lost("the service was restarted and has no samples of this client; make a new sampling client")
    ended, cursor = found
    completions = [{"state": "finished" if e.fine else "failed", "request_id": e.request_id} for e in ended]
    return reply({"completions": completions, "cursor": cursor})


def hold_seconds(headers: Mapping[str, str], longest: float) -> float:
    """How long a poll may be held: ``longest``, or less for a client with little patience."""
    try:
        patience = float(headers.get("x-stainless-read-timeout", ""))
    except ValueError:
        return longest
    # NaN fails both comparisons and so counts as no patience at all.
    return min(longest, max(patience - _MARGIN_S, patience / 2)) if patience > 0 else 0.0


def failed(failure: Failure) -> Response:
    """A final failure, which is a 200: the promise was kept, its content is an error."""
    category = failure.category if failure.category in ("user", "server") else "unknown"
    return reply({"error": failure.message, "category": category})


async def _poll(call: Call, request_id: str, headers: Mapping[str, str]) -> Response:
    hold = hold_seconds(headers, call.gateway.config.http.poll_hold_s)
    poll: Poll = await call.backend.poll(call.tenant, request_id, hold)
    if poll.state == "pending":
        return _try_again(request_id, poll.queue_state, poll.queue_reason)
    if poll.state == "gone":
        what = f"no promise {request_id!r:.80}: unknown, or expired"
        raise Lost(what) if request_id.startswith(SAMPLING_ID_PREFIX) else Absent(what)
    if poll.failure is not None:
        return failed(poll.failure)
    value = await call.gateway.resolve(poll.value)
    encode = partial(encode_result, value, headers.get("accept", ""))
    try:
        body, media_type = await call.beside(encode, num_cells(value))
    except UserError as error:
        return failed(error.as_failure())
    return Response(body, media_type=media_type)


def _try_again(request_id: str, queue_state: str, reason: str | None) -> Response:
    """408 rather than 200: the SDK logs a warning for each of the latter."""
    body = {"type": "try_again", "request_id": request_id, "queue_state": queue_state}
    return reply(body | ({"queue_state_reason": reason} if reason else {}), 408)
