"""Errors in the shape that OpenAI's clients read.

Knows statuses, types and codes. Does not know what went wrong.
"""

from __future__ import annotations

import logging
from typing import Any

from fastapi import FastAPI, Request
from starlette.responses import Response

from twinkle_serve.control.backend import Invalid, NotFound
from twinkle_serve.gateway.http import reply
from twinkle_serve.protocol.errors import UserError, WireError

logger = logging.getLogger(__name__)
_TYPES = {401: "authentication_error", 404: "not_found_error"}
_CODES = {401: "invalid_api_key", 404: "model_not_found"}
INTERNAL = "internal error; the server's log says more"


def error_body(error: Exception) -> tuple[int, dict[str, Any]]:
    """Status and JSON of ``error``; what was not raised for the client stays in the log."""
    match error:
        case WireError(status=int(status)):
            message = str(error)
        case UserError() | Invalid():
            status, message = 400, str(error)
        case NotFound():
            status, message = 404, str(error)
        case _:
            logger.error("a request failed", exc_info=error)
            status, message = 500, INTERNAL
    kind = _TYPES.get(status, "server_error" if status >= 500 else "invalid_request_error")
    return status, {
        "error": {"message": message, "type": kind, "param": None, "code": _CODES.get(status)},
    }


def install_error_handlers(app: FastAPI) -> None:
    async def refuse(request: Request, error: Exception) -> Response:
        status, body = error_body(error)
        return reply(body, status)

    async def no_route(request: Request, error: Exception) -> Response:
        status, body = error_body(NotFound(f"{request.method} {request.url.path} is not served here"))
        return reply(body, status)

    for kind in (WireError, UserError, Invalid, NotFound, Exception):
        app.add_exception_handler(kind, refuse)
    app.add_exception_handler(404, no_route)
    app.add_exception_handler(405, no_route)
