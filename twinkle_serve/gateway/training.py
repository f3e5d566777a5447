"""Training runs' commands: create, forward_backward, optim_step, save, load, unload.

Decodes and validates; ordering is the control plane's. A request whose run is known but whose content is
wrong is *accepted* and fails in its turn: the client has already spent its seq_id, and the successors wait
for that number.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any, NoReturn

from fastapi import APIRouter, Request
from starlette.responses import Response

from twinkle_serve.control.backend import (
    Command,
    LoadCommand,
    NotFound,
    OptimCommand,
    PassCommand,
    RejectedCommand,
    SaveCommand,
    SnapshotCommand,
    UnloadCommand,
)
from twinkle_serve.gateway.context import Authenticated, Call
from twinkle_serve.gateway.http import describes, describes_either, reply
from twinkle_serve.protocol import requests as wire
from twinkle_serve.protocol.bodies import parse_object
from twinkle_serve.protocol.errors import UserError
from twinkle_serve.protocol.forward import (
    CheckedPass,
    ForwardEnvelope,
    address,
    check_pass,
    check_uploaded,
    parse_json,
    parse_proto,
    uploaded_loss_id,
)
from twinkle_serve.protocol.paths import parse_path, validate_name
from twinkle_serve.protocol.recipients import check_recipients
from twinkle_serve.protocol.results import PROTOBUF
from twinkle_serve.protocol.work import Failure

router = APIRouter(tags=["training"])
logger = logging.getLogger(__name__)

LOADS = describes_either((wire.Addressed, wire.LoadWeights), (wire.CreateFromWeights,))


@router.post("/create_model", openapi_extra=describes(wire.CreateModel))
async def create_model(request: Request, call: Authenticated) -> Response:
    body = wire.read(wire.CreateModel, await call.object(request))
    wire.check_optimizer(body.optimizer_config)
    request_id = await call.backend.create_model(
        call.tenant,
        body.session_id,
        body.model_seq_id,
        body.base_model,
        body.lora_config.as_spec(wire.MAX_RANK),
        wire.as_strings(body.user_metadata),
    )
    return promise(request_id)


@router.post("/get_info", openapi_extra=describes(wire.GetInfo))
async def get_info(request: Request, call: Authenticated) -> Response:
    body = wire.read(wire.GetInfo, await call.object(request))
    run = await call.backend.run_info(call.tenant, body.model_id)
    model = run.model
    return reply(
        {
            "model_id": run.run_id,
            "model_data": {
                "arch": model.arch,
                "model_name": model.name,
                "tokenizer_id": model.tokenizer_id,
            },
            "is_lora": True,
            "lora_rank": run.spec.rank,
            "model_name": model.name,
        }
    )


@router.post("/forward_backward", openapi_extra=describes(wire.ForwardBackward))
async def forward_backward(request: Request, call: Authenticated) -> Response:
    """Protobuf or JSON, told by Content-Type; the result's form is told by the poll's Accept."""
    body = await call.body(request)
    is_proto = PROTOBUF in request.headers.get("content-type", "")
    parse = partial(parse_proto, body) if is_proto else partial(_parse_json, body, forward_only=False)
    return await _submit_pass(call, await call.beside(parse, len(body)), len(body))


@router.post("/forward", openapi_extra=describes(wire.Forward))
async def forward(request: Request, call: Authenticated) -> Response:
    """Old SDKs only; newer ones set forward_only."""
    body = await call.body(request)
    envelope = await call.beside(partial(_parse_json, body, forward_only=True), len(body))
    return await _submit_pass(call, envelope, len(body))


@router.post("/optim_step", openapi_extra=describes(wire.Addressed, wire.OptimStep))
async def optim_step(request: Request, call: Authenticated) -> Response:
    body = await call.object(request)
    return await _submit(call, body, lambda: OptimCommand(wire.read(wire.OptimStep, body).as_params()))


@router.post("/save_weights", openapi_extra=describes(wire.Addressed, wire.SaveWeights))
async def save_weights(request: Request, call: Authenticated) -> Response:
    body = await call.object(request)
    return await _submit(call, body, lambda: _save("weights", wire.read(wire.SaveWeights, body)))


@router.post("/save_weights_for_sampler", openapi_extra=describes(wire.Addressed, wire.SaveForSampler))
async def save_weights_for_sampler(request: Request, call: Authenticated) -> Response:
    body = await call.object(request)
    return await _submit(call, body, lambda: _save_for_sampler(body))


@router.post("/save_weights_external", openapi_extra=describes(wire.Addressed, wire.SaveExternal))
async def save_weights_external(request: Request, call: Authenticated) -> Response:
    body = await call.object(request)
    return await _submit(call, body, lambda: _save_external(body))


@router.post("/load_weights", openapi_extra=LOADS)
async def load_weights(request: Request, call: Authenticated) -> Response:
    """Into the run ``model_id``, or, with a session instead of a run, into a new one."""
    body = await call.object(request)
    if body.get("model_id") is not None:
        return await _submit(call, body, lambda: _load(body))
    if body.get("session_id") is None or body.get("model_seq_id") is None:
        raise UserError("load_weights needs model_id, or session_id and model_seq_id")
    load = wire.read(wire.CreateFromWeights, body)
    wire.check_optimizer(load.optimizer_config)
    request_id = await call.backend.create_model_from(
        call.tenant,
        load.session_id,
        load.model_seq_id,
        str(parse_path(load.path)),
        load.optimizer,
        load.base_model,
        wire.as_strings(load.user_metadata),
    )
    return promise(request_id)


@router.post("/unload_model", openapi_extra=describes(wire.Addressed))
async def unload_model(request: Request, call: Authenticated) -> Response:
    return await _submit(call, await call.object(request), UnloadCommand)


def promise(request_id: str, model_id: str | None = None) -> Response:
    return reply({"request_id": request_id} | ({"model_id": model_id} if model_id else {}))


async def _submit(call: Call, body: Mapping[str, Any], build: Callable[[], Command]) -> Response:
    model_id, seq_id = address(body)
    return await _submit_command(call, model_id, seq_id, _built(build))


def _parse_json(body: bytes, forward_only: bool) -> ForwardEnvelope:
    return parse_json(parse_object(body), forward_only)


async def _submit_pass(call: Call, envelope: ForwardEnvelope, body_bytes: int) -> Response:
    limits = await call.datum_limits(envelope.model_id, body_bytes)
    check: Callable[[], CheckedPass] = partial(check_pass, envelope, limits, call.gateway.whitelist)
    try:
        loss_id = uploaded_loss_id(envelope)
        if loss_id is not None:
            check = partial(check_uploaded, envelope, await call.custom_loss(loss_id), limits)
    except (UserError, NotFound) as error:
        check = partial(_refuse, str(error))
    command = await call.beside(lambda: _built(lambda: _pass(check())), body_bytes)
    return await _submit_command(call, envelope.model_id, envelope.seq_id, command)


def _refuse(message: str) -> NoReturn:
    """Where the command is built, so that the request's seq_id is spent on it."""
    raise UserError(message)


def _built(build: Callable[[], Command]) -> Command:
    try:
        return build()
    except UserError as error:
        return RejectedCommand(error.as_failure())
    except Exception:
        # The client has spent the seq_id: left out, it would hold up what follows for minutes.
        logger.exception("a command could not be checked")
        return RejectedCommand(Failure("internal error while checking this request", "server"))


async def _submit_command(call: Call, model_id: str, seq_id: int | None, command: Command) -> Response:
    return promise(await call.backend.submit(call.tenant, model_id, seq_id, command), model_id)


def _pass(checked: CheckedPass) -> PassCommand:
    return PassCommand(
        datums=checked.batch.pack(),
        lengths=tuple(checked.batch.lengths.tolist()),
        loss_fn=checked.loss_fn,
        loss_config=checked.loss_config,
        backward=checked.backward,
        loss_tokens=checked.loss_tokens,
    )


def _save(kind: str, body: wire.SaveWeights) -> SaveCommand:
    return SaveCommand(
        kind=kind,
        name=None if body.path is None else validate_name(body.path),
        ttl_seconds=body.ttl_seconds,
        overwrite=body.overwrite,
        user_metadata=wire.as_strings(body.user_metadata),
    )


def _save_for_sampler(raw: Mapping[str, Any]) -> SaveCommand | SnapshotCommand:
    body = wire.read(wire.SaveForSampler, raw)
    if body.path is None and body.sampling_session_seq_id is not None:
        if body.kind not in ("snapshot", "inflight"):
            raise UserError(f"kind {body.kind!r:.40} is neither snapshot nor inflight")
        return SnapshotCommand(body.sampling_session_seq_id, body.kind == "inflight")
    return _save("sampler_weights", body)


def _save_external(raw: Mapping[str, Any]) -> SaveCommand:
    body = wire.read(wire.SaveExternal, raw)
    if body.path is None:
        raise UserError("path: an export needs a name")
    recipients = check_recipients(body.age_encryption_recipients)
    return replace(_save("external_weights", body), age_recipients=recipients)


def _load(raw: Mapping[str, Any]) -> LoadCommand:
    body = wire.read(wire.LoadWeights, raw)
    wire.check_optimizer(body.optimizer_config)
    return LoadCommand(str(parse_path(body.path)), body.optimizer)
