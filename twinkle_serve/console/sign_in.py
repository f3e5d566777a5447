"""Signing in: from an API key to a cookie and back.

The cookie is the key itself, encrypted under a secret of the service: so each request is checked like one of
the SDK, and a key that is revoked signs out everywhere. Knows no pages.
"""

from __future__ import annotations

import base64
import hashlib
import hmac

from cryptography.fernet import Fernet, InvalidToken
from fastapi import Request
from starlette.responses import Response

COOKIE = "twinkle_console"
MAX_KEY_CHARS = 4096


class Seal:
    """All ingress replicas must have the same ``secret``."""

    def __init__(self, secret: bytes, hours: float) -> None:
        key = hmac.digest(secret, b"twinkle console sign-in", hashlib.sha256)
        self._fernet = Fernet(base64.urlsafe_b64encode(key))
        self._seconds = round(hours * 3600)

    def sealed(self, key: str) -> str:
        """What goes into the cookie."""
        return self._fernet.encrypt(key.encode("utf-8", "surrogateescape")).decode()

    def opened(self, cookie: str | None) -> str | None:
        """The key; None if the cookie is missing, not ours, or too old."""
        if not cookie:
            return None
        try:
            plain = self._fernet.decrypt(cookie.encode("utf-8", "surrogateescape"), ttl=self._seconds)
        except InvalidToken:
            return None
        return plain.decode("utf-8", "surrogateescape")

    def put(self, response: Response, request: Request, key: str) -> None:
        """Sign the browser in. The cookie is not for scripts, and no other site can make use of it."""
        response.set_cookie(
            COOKIE,
            self.sealed(key),
            max_age=self._seconds,
            path=request.scope["root_path"] or "/",
            secure=_is_https(request),
            httponly=True,
            samesite="strict",
        )

    def remove(self, response: Response, request: Request) -> None:
        path = request.scope["root_path"] or "/"
        response.delete_cookie(COOKIE, path=path, secure=_is_https(request), httponly=True, samesite="strict")


def _is_https(request: Request) -> bool:
    return "https" in (request.url.scheme, request.headers.get("x-forwarded-proto"))
