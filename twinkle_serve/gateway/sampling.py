"""Sampling sessions and samples.

Knows the JSON of both. Does not know where a sampler's weights are nor when they are loaded.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from twinkle_serve.gateway.context import Authenticated
from twinkle_serve.gateway.http import describes, no_content, reply
from twinkle_serve.protocol.bodies import parse_object
from twinkle_serve.protocol.data import SampleRequest
from twinkle_serve.protocol.errors import MalformedBody, UserError
from twinkle_serve.protocol.paths import parse_path
from twinkle_serve.protocol.requests import CreateSamplingSession, RequestId, read
from twinkle_serve.protocol.sample import SampleAddress, SampleBody, SampleLimits, decode_sample
from twinkle_serve.protocol.showing import shown
from twinkle_serve.protocol.work import Failure

router = APIRouter(tags=["sampling"])


@router.post("/create_sampling_session", openapi_extra=describes(CreateSamplingSession))
async def create_sampling_session(request: Request, call: Authenticated) -> Response:
    body = read(CreateSamplingSession, await call.object(request))
    if body.base_model is None and body.model_path is None:
        raise UserError("create_sampling_session needs base_model or model_path")
    path = None if body.model_path is None else str(parse_path(body.model_path))
    sampler_id = await call.backend.create_sampler(
        call.tenant, body.session_id, body.sampling_session_seq_id, body.base_model, path
    )
    return reply({"sampling_session_id": sampler_id})


@router.get("/samplers/{sampler_id}")
async def get_sampler(sampler_id: str, call: Authenticated) -> Response:
    info = await call.backend.sampler_info(call.tenant, sampler_id)
    told = {key: info.get(key) for key in ("sampler_id", "base_model", "model_path")}
    return reply({key: value for key, value in told.items() if value is not None})


@router.post("/asample", openapi_extra=describes(SampleAddress, SampleBody))
async def asample(request: Request, call: Authenticated) -> Response:
    """Accepted at once; a request whose content is wrong fails as a promise, like a training command."""
    sent = await call.body(request)
    body = await call.beside(partial(parse_object, sent), len(sent))
    sampler_id, seq_id = body.get("sampling_session_id"), body.get("seq_id")
    if not isinstance(sampler_id, str) or not sampler_id:
        raise MalformedBody("sampling_session_id is missing; create a sampling session first")
    # Cloned clients number from clone * 10^9, which needs all 64 bits.
    if seq_id is not None and (type(seq_id) is not int or not 0 <= seq_id < 2**63):
        raise MalformedBody(f"seq_id must be a whole number from 0 to 2^63-1, got {shown(seq_id)}")
    limits = await call.sample_limits(sampler_id)
    sample = await call.beside(partial(_decoded, body, limits), len(sent))
    request_id, sequence_ids = await call.backend.sample(call.tenant, sampler_id, seq_id, sample)
    return reply({"request_id": request_id, "sample_sequence_ids": sequence_ids})


def _decoded(body: Mapping[str, Any], limits: SampleLimits) -> SampleRequest | Failure:
    try:
        return decode_sample(body, limits)
    except UserError as error:
        return error.as_failure()


@router.post("/cancel_future", openapi_extra=describes(RequestId))
async def cancel_future(request: Request, call: Authenticated) -> Response:
    """The user no longer wants a sample. Idempotent, and fine for an id that nobody knows."""
    body = read(RequestId, await call.object(request))
    await call.backend.cancel(call.tenant, body.request_id)
    return no_content()
