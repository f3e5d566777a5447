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
from concurrent.futures import ThreadPoolExecutor
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
# While nobody can tell, a request with a key that was good lately waits so long, seconds, once in so many.
_PATIENCE_S, _AWAY_S = 2.0, 15.0
# Keys that nobody knows yet and that are asked about at the same time.
_MAX_STRANGE = 256


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
    # It counts until then without a question.
    ask_at: float


class CheckedIdentity:
    """Asks ``check`` about each key, at most once in a while, and remembers the answer by a keyed hash.

    good_s, bad_s: how long a good and a bad answer count, seconds. grace_s: how long a good one still counts
    while ``check`` cannot tell, or takes long. Keys that were good lately are asked about in threads of their
    own and remembered apart from bad ones, so that no number of made-up keys gets in their way.
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
        self._good, self._bad = _Remembered(), _Remembered()
        self._asking: dict[bytes, asyncio.Task[_Verdict]] = {}
        self._num_strange = 0
        self._known_threads = ThreadPoolExecutor(8, "known-key")
        self._strange_threads = ThreadPoolExecutor(16, "strange-key")

    async def identify(self, headers: Mapping[str, str]) -> Caller:
        key = api_key(headers)
        if key is None:
            raise Unauthorized(_NO_KEY)
        digest = self._digest(key)
        verdict = self._good.get(digest) or self._bad.get(digest)
        if verdict is None or self._now() > verdict.ask_at:
            verdict = await self._ask(digest, key)
        if verdict.caller is None:
            raise Unauthorized("this API key is not valid here, or its user is not a member")
        return verdict.caller

    async def revoke(self, headers: Mapping[str, str]) -> None:
        await self.identify(headers)
        key = api_key(headers)
        if self._revoke is None or key is None:
            raise UserError(_NOT_OURS)
        await asyncio.to_thread(self._revoke, key)
        self._good.pop(self._digest(key), None)

    def _digest(self, key: str) -> bytes:
        return hmac.digest(self._secret, key.encode("utf-8", "surrogateescape"), "sha256")

    async def _ask(self, digest: bytes, key: str) -> _Verdict:
        """One question at a time about a key, however many requests bring it. Who was good lately does not
        wait for an answer that is long in coming, and then not again for a while: heartbeats have 10 s."""
        known = self._good.get(digest)
        task = self._asking.get(digest) or self._question(digest, key, known is not None)
        grace_ends = 0.0 if known is None else known.checked_at + self._grace_s
        if known is None or self._now() > grace_ends:
            return await asyncio.shield(task)
        await asyncio.wait({task}, timeout=_PATIENCE_S)
        if task.done() and not isinstance(task.exception(), BackendUnavailable):
            return task.result()
        known.ask_at = min(self._now() + _AWAY_S, grace_ends)
        return known

    def _question(self, digest: bytes, key: str, is_known: bool) -> asyncio.Task[_Verdict]:
        if not is_known and self._num_strange >= _MAX_STRANGE:
            raise BackendUnavailable("too many new API keys are being checked at the moment")

        def ended(task: asyncio.Task[_Verdict]) -> None:
            del self._asking[digest]
            self._num_strange -= not is_known
            if not task.cancelled():
                task.exception()  # whoever waited has it; there may be nobody left

        task = self._asking[digest] = asyncio.create_task(self._answer(digest, key, is_known))
        self._num_strange += not is_known
        task.add_done_callback(ended)
        return task

    async def _answer(self, digest: bytes, key: str, is_known: bool) -> _Verdict:
        threads = self._known_threads if is_known else self._strange_threads
        caller = await asyncio.get_running_loop().run_in_executor(threads, self._check, key)
        now = self._now()
        verdict = _Verdict(caller, now, now + (self._good_s if caller else self._bad_s))
        self._good.pop(digest, None)
        (self._good if caller else self._bad).remember(digest, verdict)
        return verdict


class _Remembered(OrderedDict[bytes, _Verdict]):
    """The latest verdicts, by a key's digest."""

    def remember(self, digest: bytes, verdict: _Verdict) -> None:
        self[digest] = verdict
        self.move_to_end(digest)
        while len(self) > _MAX_REMEMBERED:
            self.popitem(last=False)


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
