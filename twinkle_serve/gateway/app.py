"""The HTTP application: every route, and nothing but wiring.

Knows which parts there are. Does not know Ray: cluster code hands in the backend, and how a handle becomes a
value.
"""

from __future__ import annotations

import secrets
from collections.abc import Awaitable, Callable
from typing import Any

from fastapi import FastAPI

from twinkle_serve import __version__
from twinkle_serve.config import Config
from twinkle_serve.control.backend import Backend
from twinkle_serve.control.metrics import Meter, Silent
from twinkle_serve.control.spans import Span
from twinkle_serve.gateway import (
    checkpoints,
    custom_losses,
    downloads,
    futures,
    management,
    runs,
    sampling,
    service,
    sessions,
    training,
)
from twinkle_serve.gateway.context import Gateway, itself
from twinkle_serve.gateway.http import install_error_handlers
from twinkle_serve.gateway.identity import Identity, create_identity
from twinkle_serve.gateway.insights import router as insights
from twinkle_serve.gateway.links import Links
from twinkle_serve.gateway.observing import Observed
from twinkle_serve.gateway.openai.app import create_openai_app
from twinkle_serve.gateway.publishing import create_publisher
from twinkle_serve.hub.losses import spec_of

PREFIX = "/api/v1"


def create_app(
    backend_provider: Callable[[], Backend],
    config: Config,
    *,
    resolve: Callable[[Any], Awaitable[Any]] = itself,
    identity: Identity | None = None,
    signing_secret: bytes | None = None,
    meter: Meter | None = None,
    export_span: Callable[[Span], None] | None = None,
) -> FastAPI:
    """The application of one ingress replica.

    backend_provider: called once per request; may raise BackendUnavailable, as may the backend's methods.
    resolve: turns the value of a finished promise (perhaps a handle) into a protocol.data result.
    signing_secret: signs download links and sign-ins; all replicas need the same. None: a random one.
    meter, export_span: where numbers and spans go. None: nowhere.
    """
    app = FastAPI(title="Twinkle Serve", version=__version__, docs_url="/docs", redoc_url=None)
    gateway = Gateway(
        backend_provider=backend_provider,
        config=config,
        identity=identity or create_identity(config),
        links=Links(signing_secret or secrets.token_bytes(32)),
        resolve=resolve,
        publisher=create_publisher(config),
        whitelist={loss.name: spec_of(loss) for loss in config.losses.whitelist},
    )
    app.state.gateway = gateway
    install_error_handlers(app)
    # Routes are tried in this order, so what is asked most often comes first.
    for part in (
        futures,
        sampling,
        training,
        custom_losses,
        sessions,
        service,
        runs,
        checkpoints,
        management,
        downloads,
    ):
        app.include_router(part.router, prefix=PREFIX)
    app.include_router(insights, prefix=PREFIX)
    app.mount("/v1", create_openai_app(gateway, __version__))
    app.add_middleware(Observed, meter=meter or Silent(), export=export_span)
    return app
