"""Download links that work without a key, for a while: signing and checking.

Knows the secret and the clock. Does not know files; whoever holds a valid link acts for the tenant in it,
and only for the one file it names.
"""

from __future__ import annotations

import hashlib
import hmac
import time
from collections.abc import Callable
from dataclasses import dataclass
from urllib.parse import quote, urlencode

from twinkle_serve.protocol.errors import Unauthorized

LIFETIME_S = 3600


@dataclass(frozen=True, slots=True)
class Links:
    """All replicas must have the same ``secret``."""

    secret: bytes
    now: Callable[[], float] = time.time

    def sign(self, tenant: str, resource: str) -> tuple[str, int]:
        """The query string for ``resource`` (a URL path below the API), and when it expires (POSIX)."""
        expires = int(self.now()) + LIFETIME_S
        token = self._token(tenant, resource, expires)
        return urlencode({"tenant": tenant, "expires": expires, "token": token}), expires

    def check(self, tenant: str, resource: str, expires: int, token: str) -> None:
        """Raises Unauthorized unless ``sign`` made exactly this link less than its lifetime ago."""
        wanted = self._token(tenant, resource, expires)
        if not hmac.compare_digest(wanted.encode(), token.encode("utf-8", "surrogateescape")):
            raise Unauthorized("this download link is not valid")
        if expires < self.now():
            raise Unauthorized("this download link has expired; ask for a new one")

    def _token(self, tenant: str, resource: str, expires: int) -> str:
        message = "\n".join((tenant, resource, str(expires))).encode("utf-8", "surrogateescape")
        return hmac.new(self.secret, message, hashlib.sha256).hexdigest()


def resource_path(*parts: str) -> str:
    """Parts of a URL path, each quoted; a run id's colons stay readable."""
    return "/".join(quote(part, safe=":") for part in parts)
