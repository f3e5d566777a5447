"""The console as an application of its own, and how it joins the gateway's.

Knows which parts there are, and how errors look to people.
"""

from __future__ import annotations

from urllib.parse import urlencode

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.responses import RedirectResponse, Response
from starlette.staticfiles import StaticFiles

from twinkle_serve.console import actions, landing, pages
from twinkle_serve.console.render import HEADERS, STATIC, language_of, page
from twinkle_serve.console.sign_in import Seal
from twinkle_serve.console.texts import translator
from twinkle_serve.console.visitors import ForeignForm, SignInNeeded
from twinkle_serve.control.backend import Invalid, NotFound
from twinkle_serve.gateway.context import Gateway
from twinkle_serve.gateway.http import refusal
from twinkle_serve.gateway.openai.models import Texts
from twinkle_serve.protocol.errors import BackendUnavailable, UserError, WireError


def add_console(app: FastAPI) -> None:
    """Serve the console below /console and the short page at / of the gateway's application."""
    gateway: Gateway = app.state.gateway
    if gateway.config.console.enabled:
        app.mount("/console", create_console(gateway))
    else:
        app.mount("/console/static", StaticFiles(directory=STATIC))  # for the short page
    app.include_router(landing.router)


def create_console(gateway: Gateway) -> FastAPI:
    app = FastAPI(title="Twinkle Serve console", docs_url=None, redoc_url=None, openapi_url=None)
    app.state.gateway = gateway
    app.state.texts = Texts(gateway.config)
    app.state.seal = Seal(gateway.links.secret, gateway.config.console.session_hours)
    app.mount("/static", StaticFiles(directory=STATIC), name="static")
    for part in (pages, actions):
        app.include_router(part.router)
    _install_error_handlers(app)
    return app


def _install_error_handlers(app: FastAPI) -> None:
    async def sign_in(request: Request, error: Exception) -> Response:
        if _wants_json(request):
            return refusal(401, "sign in again")
        base = request.scope["root_path"]
        query = urlencode({"next": request.url.path}) if request.method == "GET" else ""
        return RedirectResponse(f"{base}/sign-in?{query}", 303, headers=HEADERS)

    async def trouble(request: Request, error: Exception) -> Response:
        words = translator(language_of(request))
        status, message = _status_of(error), str(error)
        if status == 404:
            message = words("not_found")
        elif status == 403:
            message = words("foreign_form")
        elif status == 503:
            message = f"{words('away')} ({error})"
        if _wants_json(request):
            return refusal(status, message)
        return page(request, "error.html", status, visitor=None, message=message, retry=status == 503)

    app.add_exception_handler(SignInNeeded, sign_in)
    for kind in (ForeignForm, WireError, UserError, Invalid, NotFound, RequestValidationError, 404, 405):
        app.add_exception_handler(kind, trouble)


def _status_of(error: Exception) -> int:
    match error:
        case ForeignForm():
            return 403
        case BackendUnavailable():
            return 503
        case WireError():
            return error.status
        case UserError() | Invalid() | RequestValidationError():
            return 400
    return 404


def _wants_json(request: Request) -> bool:
    return request.url.path.endswith(("/curves", "/chat"))
