"""The application below /v1, in front of the same backend and with the same keys as the SDK's.

Knows which parts there are, and nothing but wiring.
"""

from __future__ import annotations

from fastapi import FastAPI

from twinkle_serve.gateway.context import Gateway
from twinkle_serve.gateway.openai import completions, models
from twinkle_serve.gateway.openai.errors import install_error_handlers
from twinkle_serve.gateway.openai.models import Texts


def create_openai_app(gateway: Gateway, version: str) -> FastAPI:
    """To be mounted at /v1: its errors look different from those of the rest."""
    app = FastAPI(title="Twinkle Serve, OpenAI-compatible", version=version, docs_url="/docs", redoc_url=None)
    app.state.gateway = gateway
    app.state.texts = Texts(gateway.config)
    for part in (completions, models):
        app.include_router(part.router)
    install_error_handlers(app)
    return app
