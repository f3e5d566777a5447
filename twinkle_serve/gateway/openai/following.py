"""Samples from submission to result, and their end when the client goes away.

Knows that a client which hangs up wants nothing any more: its request is cancelled and what it holds is
freed. Does not know text or JSON.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress

from fastapi import Request

from twinkle_serve.control.backend import Poll
from twinkle_serve.gateway.context import Call
from twinkle_serve.gateway.openai.models import Target
from twinkle_serve.protocol.data import SampleDelta, SampleRequest, SampleResult
from twinkle_serve.protocol.errors import BackendUnavailable, UserError, WireError

# A client that hangs up is noticed after this, and a stream's silence ends after this, seconds.
_LOOK_EVERY_S = 2.0
_cancelling: set[asyncio.Task[None]] = set()


class SampleFailed(WireError):
    """The server could not do it."""

    status = 500


class HungUp(WireError):
    """Nobody is left to read this."""

    status = 499


@asynccontextmanager
async def submitted(
    call: Call, target: Target, requests: Sequence[SampleRequest], stream: bool = False
) -> AsyncIterator[list[str]]:
    """The ids of these requests. Leaving the block before all of them are done cancels them."""
    request_ids: list[str] = []
    base_model = target.info.name if target.path is None else None
    try:
        for request in requests:
            request_ids.append(
                await call.backend.sample_model(call.tenant, base_model, target.path, request, stream)
            )
        yield request_ids
    except BaseException:
        # Not awaited here: where a task is being cancelled every wait ends at once.
        task = asyncio.get_running_loop().create_task(_cancel(call, request_ids))
        _cancelling.add(task)
        task.add_done_callback(_cancelling.discard)
        raise


async def _cancel(call: Call, request_ids: Sequence[str]) -> None:
    for request_id in request_ids:
        with suppress(BackendUnavailable):
            await call.backend.cancel(call.tenant, request_id)


async def finished(call: Call, request: Request, request_ids: Sequence[str]) -> list[SampleResult]:
    """All of them, in this order. Raises UserError, SampleFailed, BackendUnavailable, or HungUp when the
    client is gone; the first of these is the end of all."""
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(_finished(call, request_id)) for request_id in request_ids]
            watch = group.create_task(_watch(request))
            results = [await task for task in tasks]
            watch.cancel()
    except ExceptionGroup as errors:
        raise errors.exceptions[0] from None
    return results


async def _finished(call: Call, request_id: str) -> SampleResult:
    while True:
        poll = await call.backend.poll(call.tenant, request_id, call.gateway.config.http.poll_hold_s)
        if poll.state != "pending":
            return await _result(call, poll)


async def _watch(request: Request) -> None:
    """Once for all that a request asks for: each of its polls is held for as long as there is no news."""
    while not await request.is_disconnected():
        await asyncio.sleep(_LOOK_EVERY_S)
    raise HungUp("the client is gone")


async def followed(call: Call, request_id: str) -> AsyncIterator[tuple[SampleDelta, ...] | SampleResult]:
    """Deltas as they come (none after a silence), at last the result. Raises what ``finished`` does."""
    count = 0
    while True:
        poll = await call.backend.follow(call.tenant, request_id, count, _LOOK_EVERY_S)
        if poll.state != "pending":
            yield await _result(call, poll)
            return
        deltas: tuple[SampleDelta, ...] = poll.value or ()
        count += len(deltas)
        yield deltas


async def _result(call: Call, poll: Poll) -> SampleResult:
    if poll.state == "gone":
        raise BackendUnavailable("the sample was lost with the worker that drew it; ask again")
    if poll.failure is not None:
        if poll.failure.category == "user":
            raise UserError(poll.failure.message)
        raise SampleFailed(poll.failure.message)
    result: SampleResult = await call.gateway.resolve(poll.value)
    return result
