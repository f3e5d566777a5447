"""Who is calling: from request headers to a tenant.

Knows where the clients put their key, and whom to ask about it. No key is ever logged or kept. Does not know
what a tenant may do; the control plane treats other tenants' objects as absent.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import secrets
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

from twinkle_serve.config import Config
from twinkle_serve.hub.users import HubAway, HubUsers
from twinkle_serve.protocol.errors import BackendUnavailable, Unauthorized, UserError
from twinkle_serve.storage.keys import PREFIX, KeyStore
from twinkle_serve.tenants import tenant_of_user

_NOT_OURS = "this server did not give out the key, so it cannot take it back"
_NO_KEY = "no API key: send it as X-API-Key or as Authorization: Bearer"
# A revoked key stops working within this time.
_OWN_KEY_S = 20.0
_MAX_REMEMBERED = 10_000


@dataclass(frozen=True, slots=True)
class Caller:
    """tenant: opaque, the owner of everything this caller makes. name: shown to the caller."""

    tenant: str
    name: str


class Identity(Protocol):
    """Turns headers into a caller. Raises Unauthorized, or BackendUnavailable when it cannot tell."""

    async def identify(self, headers: Mapping[str, str]) -> Caller: ...

    async def revoke(self, headers: Mapping[str, str]) -> None:
        """The key in ``headers`` counts no more. Raises UserError where keys are not this server's own."""
        ...


class OpenIdentity:
    """Every distinct key is its own tenant; any key will do, but there must be one."""

    async def revoke(self, headers: Mapping[str, str]) -> None:
        raise UserError(_NOT_OURS)

    async def identify(self, headers: Mapping[str, str]) -> Caller:
        key = api_key(headers)
        if key is None:
            raise Unauthorized(_NO_KEY)
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


KeyCheck = Callable[[str], Caller | None]
"""Whose key this is, None if it is nobody's. Blocks. Raises BackendUnavailable when that cannot be told."""


@dataclass(slots=True)
class _Verdict:
    caller: Caller | None
    checked_at: float


class CheckedIdentity:
    """Asks ``check`` about each key, at most once in a while, and remembers the answer by a keyed hash.

    good_s, bad_s: how long a good and a bad answer count, seconds. grace_s: how long a good one still counts
    while ``check`` cannot tell.
    """

    def __init__(
        self,
        check: KeyCheck,
        *,
        good_s: float,
        bad_s: float = 5.0,
        grace_s: float = 0.0,
        revoke: Callable[[str], None] | None = None,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self._check = check
        self._revoke = revoke
        self._good_s, self._bad_s, self._grace_s = good_s, bad_s, grace_s
        self._now = now
        self._secret = secrets.token_bytes(32)
        self._verdicts: OrderedDict[bytes, _Verdict] = OrderedDict()
        self._asking: dict[bytes, asyncio.Task[_Verdict]] = {}

    async def identify(self, headers: Mapping[str, str]) -> Caller:
        key = api_key(headers)
        if key is None:
            raise Unauthorized(_NO_KEY)
        digest = self._digest(key)
        verdict = self._verdicts.get(digest)
        if verdict is None or self._age(verdict) > (self._good_s if verdict.caller else self._bad_s):
            verdict = await self._ask(digest, key, verdict)
        if verdict.caller is None:
            raise Unauthorized("this API key is not valid here, or its user is not a member")
        return verdict.caller

    async def revoke(self, headers: Mapping[str, str]) -> None:
        await self.identify(headers)
        key = api_key(headers)
        if self._revoke is None or key is None:
            raise UserError(_NOT_OURS)
        await asyncio.to_thread(self._revoke, key)
        self._verdicts.pop(self._digest(key), None)

    def _digest(self, key: str) -> bytes:
        return hmac.digest(self._secret, key.encode("utf-8", "surrogateescape"), "sha256")

    def _age(self, verdict: _Verdict) -> float:
        return self._now() - verdict.checked_at

    async def _ask(self, digest: bytes, key: str, known: _Verdict | None) -> _Verdict:
        """One question at a time about a key, however many requests bring it."""
        task = self._asking.get(digest)
        if task is None:
            task = self._asking[digest] = asyncio.create_task(self._answer(digest, key))
            task.add_done_callback(lambda _: self._asking.pop(digest, None))
        try:
            return await asyncio.shield(task)
        except BackendUnavailable:
            if known is not None and known.caller is not None and self._age(known) <= self._grace_s:
                return known
            raise

    async def _answer(self, digest: bytes, key: str) -> _Verdict:
        caller = await asyncio.to_thread(self._check, key)
        verdict = self._verdicts[digest] = _Verdict(caller, self._now())
        self._verdicts.move_to_end(digest)
        while len(self._verdicts) > _MAX_REMEMBERED:
            self._verdicts.popitem(last=False)
        return verdict


def check_own_key(store: KeyStore) -> KeyCheck:
    """Keys that `twinkle-serve keys` gave out."""

    def check(key: str) -> Caller | None:
        record = store.find(key)
        return None if record is None else Caller(record.tenant, record.name)

    return check


def check_modelscope_token(users: HubUsers) -> KeyCheck:
    """ModelScope tokens, bare or behind the prefix that the SDK insists on."""

    def check(key: str) -> Caller | None:
        token = key.removeprefix(PREFIX)
        # Nothing else can be a token, nor be sent to ModelScope in a header.
        if not token or not token.isascii() or not token.isprintable():
            return None
        try:
            user = users.user_of(token)
        except HubAway:
            raise BackendUnavailable("ModelScope does not answer; your token could not be checked") from None
        if user is None:
            return None
        return Caller(tenant_of_user(user), user)

    return check


def create_identity(config: Config) -> Identity:
    """The identity that ``auth.mode`` names."""
    auth = config.auth
    if auth.mode == "open":
        return OpenIdentity()
    if auth.mode == "keys":
        store = KeyStore(config.storage.root)
        return CheckedIdentity(check_own_key(store), good_s=_OWN_KEY_S, revoke=store.revoke_key)
    hub = auth.modelscope
    check = check_modelscope_token(HubUsers(hub))
    return CheckedIdentity(check, good_s=hub.cache_s, grace_s=hub.grace_s)
