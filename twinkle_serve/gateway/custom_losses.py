"""create_custom_loss: a loss as a graph of torch operations, kept for the requests of its session.

Knows the route. Does not know what may be in a graph (protocol/loss_graph.py), nor how a rank tries it.
"""

from __future__ import annotations

from fastapi import APIRouter, Request
from starlette.responses import Response

from twinkle_serve.gateway.context import Authenticated
from twinkle_serve.gateway.http import describes
from twinkle_serve.gateway.training import promise
from twinkle_serve.protocol import requests as wire
from twinkle_serve.protocol.errors import UserError
from twinkle_serve.protocol.loss_graph import MAX_TEXT_BYTES, check_graph
from twinkle_serve.protocol.work import Failure

router = APIRouter(tags=["training"])
_MAX_BODY_BYTES = 4 * MAX_TEXT_BYTES
"""A graph within its limit fits, however it is spaced; nobody parses more."""


@router.post("/create_custom_loss", openapi_extra=describes(wire.CreateCustomLoss))
async def create_custom_loss(request: Request, call: Authenticated) -> Response:
    body = wire.read(wire.CreateCustomLoss, await call.object(request, _MAX_BODY_BYTES))
    graph: str | Failure
    if call.gateway.config.losses.custom_loss_server_side:
        try:
            graph = check_graph(body.name, body.inputs, body.graph)
        except UserError as error:
            graph = error.as_failure()
    else:
        graph = Failure("this server runs no uploaded losses (losses.custom_loss_server_side is off)")
    return promise(
        await call.backend.create_custom_loss(call.tenant, body.session_id, body.custom_loss_seq_id, graph)
    )
