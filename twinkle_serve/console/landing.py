"""The page at /: what this is, how to connect, which models. It needs no key.

Knows what anybody who can reach the port may know. Does not know callers.
"""

from __future__ import annotations

from fastapi import APIRouter, Request
from starlette.responses import Response

from twinkle_serve.console.render import page
from twinkle_serve.gateway.context import gateway_of
from twinkle_serve.protocol.errors import BackendUnavailable

router = APIRouter()


@router.get("/", include_in_schema=False)
async def landing(request: Request) -> Response:
    gateway = gateway_of(request)
    try:
        models = await gateway.backend_provider().models()
    except BackendUnavailable:
        models = []
    url = (gateway.config.http.public_url or str(request.base_url)).rstrip("/")
    names = [model.name for model in gateway.config.models]
    return page(
        request,
        "landing.html",
        visitor=None,
        url=url,
        names=names,
        models=models,
        is_open=gateway.config.auth.mode == "open",
        has_console=gateway.config.console.enabled,
        console=f"{request.scope['root_path']}/console",
    )
