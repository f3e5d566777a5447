"""Bodies in and JSON out, the same way on every route.

Knows size limits, encodings and how an error looks. Does not know what a route means.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from fastapi import FastAPI, Request
from starlette.requests import ClientDisconnect
from starlette.responses import Response

from twinkle_serve.control.backend import Invalid, NotFound
from twinkle_serve.protocol.bodies import decompress
from twinkle_serve.protocol.errors import BodyTooLarge, Busy, UserError, WireError
from twinkle_serve.protocol.requests import Lenient
from twinkle_serve.protocol.results import JSON, dump

logger = logging.getLogger(__name__)


def reply(value: Any, status: int = 200) -> Response:
    """``value`` as JSON with a Content-Length, which the SDK wants to see on a 400."""
    return Response(dump(value), status, media_type=JSON)


def no_content() -> Response:
    return Response(status_code=204)


def refusal(status: int, message: str) -> Response:
    return reply({"detail": message}, status)


async def read_body(request: Request, max_bytes: int) -> bytes:
    """The decompressed body. Raises BodyTooLarge as soon as that is sure, MalformedBody."""
    sent = await sent_body(request, max_bytes)
    return decompress(sent, request.headers.get("content-encoding"), max_bytes)


async def sent_body(request: Request, max_bytes: int) -> bytes:
    """The body as it was sent, perhaps compressed. Raises BodyTooLarge as soon as that is sure."""
    announced = request.headers.get("content-length", "")
    if announced.isdigit() and int(announced) > max_bytes:
        raise BodyTooLarge(f"the body has {announced} bytes; at most {max_bytes} are accepted")
    parts, size = [], 0
    async for part in request.stream():
        size += len(part)
        if size > max_bytes:
            raise BodyTooLarge(f"the body has more than {max_bytes} bytes")
        parts.append(part)
    return parts[0] if len(parts) == 1 else b"".join(parts)


def expected_bytes(request: Request, max_bytes: int) -> int:
    """How much memory the body may take once it is read; the worst where that is not said."""
    announced = request.headers.get("content-length", "")
    if announced.isdigit() and request.headers.get("content-encoding", "identity") == "identity":
        return min(int(announced), max_bytes)
    bodyless = "transfer-encoding" not in request.headers and announced in ("", "0")
    return 0 if bodyless else max_bytes


def describes(*models: type[Lenient]) -> dict[str, Any]:
    """For the API page: handlers read their bodies themselves, so FastAPI cannot see the schema. A body
    has the fields of all ``models``."""
    return _request_body(_schema(models))


def describes_either(*forms: Sequence[type[Lenient]]) -> dict[str, Any]:
    """As ``describes``, for a body that has one of several forms."""
    return _request_body({"anyOf": [_schema(models) for models in forms]})


def _request_body(schema: dict[str, Any]) -> dict[str, Any]:
    return {"requestBody": {"content": {JSON: {"schema": schema}}}}


def _schema(models: Sequence[type[Lenient]]) -> dict[str, Any]:
    properties: dict[str, Any] = {}
    required: set[str] = set()
    for model in models:
        schema = model.model_json_schema()
        schema = _inlined(schema, schema.pop("$defs", {}))
        properties |= schema.get("properties", {})
        required |= set(schema.get("required", ()))
    return {"type": "object", "properties": properties, "required": sorted(required)}


def _inlined(node: Any, definitions: dict[str, Any]) -> Any:
    """``node`` with each reference replaced by what it refers to."""
    if isinstance(node, list):
        return [_inlined(item, definitions) for item in node]
    if not isinstance(node, dict):
        return node
    if "$ref" in node:
        return _inlined(definitions[node["$ref"].rpartition("/")[2]], definitions)
    return {key: _inlined(value, definitions) for key, value in node.items()}


def install_error_handlers(app: FastAPI) -> None:
    """Every error is ``{"detail": text}`` with the status of protocol/errors.py; ours carry no traceback."""

    async def wire_error(request: Request, error: Exception) -> Response:
        assert isinstance(error, WireError)
        return refusal(error.status, str(error))

    async def busy(request: Request, error: Exception) -> Response:
        assert isinstance(error, Busy)
        why = {"queue_state": error.queue_state, "queue_state_reason": str(error)}
        answer = reply({"detail": str(error), **why}, error.status)
        answer.headers["Retry-After"] = "1"
        return answer

    async def bad_request(request: Request, error: Exception) -> Response:
        return refusal(400, str(error))

    async def not_found(request: Request, error: Exception) -> Response:
        return refusal(404, str(error) or "not found")

    async def no_route(request: Request, error: Exception) -> Response:
        """A wrong method included: to the SDK an endpoint that is not served is one that is not found."""
        return refusal(404, f"{request.method} {request.url.path} is not served here")

    async def gone(request: Request, error: Exception) -> Response:
        """The client left before its request was whole: nobody reads this."""
        return refusal(400, "the request ended early")

    async def internal(request: Request, error: Exception) -> Response:
        logger.error("%s %s failed", request.method, request.url.path, exc_info=error)
        return refusal(500, "internal error; the server's log says more")

    app.add_exception_handler(WireError, wire_error)
    app.add_exception_handler(Busy, busy)
    app.add_exception_handler(UserError, bad_request)
    app.add_exception_handler(Invalid, bad_request)
    app.add_exception_handler(NotFound, not_found)
    app.add_exception_handler(ClientDisconnect, gone)
    app.add_exception_handler(404, no_route)
    app.add_exception_handler(405, no_route)
    app.add_exception_handler(Exception, internal)
