"""Who is calling: from request headers to a tenant.

Knows where the clients put their key. Does not know what a tenant may do; the control plane treats other
tenants' objects as absent.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from twinkle_serve.config import AuthConfig
from twinkle_serve.protocol.errors import Unauthorized


@dataclass(frozen=True, slots=True)
class Caller:
    """tenant: opaque, the owner of everything this caller makes. name: shown to the caller."""

    tenant: str
    name: str


class Identity(Protocol):
    """Turns headers into a caller. Raises Unauthorized, or BackendUnavailable when it cannot tell."""

    async def identify(self, headers: Mapping[str, str]) -> Caller: ...


class OpenIdentity:
    """Every distinct key is its own tenant; any key will do, but there must be one."""

    async def identify(self, headers: Mapping[str, str]) -> Caller:
        key = api_key(headers)
        if key is None:
            raise Unauthorized("no API key: send it as X-API-Key or as Authorization: Bearer")
        tenant = hashlib.sha256(key.encode("utf-8", "surrogateescape")).hexdigest()[:16]
        return Caller(tenant, f"key {tenant[:8]}")


def api_key(headers: Mapping[str, str]) -> str | None:
    """The caller's key: X-API-Key (the SDK), Authorization or Twinkle-Authorization, Bearer or bare."""
    for name in ("x-api-key", "authorization", "twinkle-authorization"):
        words = headers.get(name, "").split()
        if words and words[0].lower() == "bearer":
            words = words[1:]
        if words:
            return " ".join(words)
    return None


def create_identity(config: AuthConfig) -> Identity:
    """The identity that ``auth.mode`` names."""
    if config.mode != "open":
        raise ValueError(f"auth.mode {config.mode!r} is not available yet; open is")
    return OpenIdentity()
