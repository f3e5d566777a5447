"""Clients' sessions: heartbeats, the numbers handed out within one, and how one ends.

Knows tenants and time. Does not know runs, samplers or what is freed when a session ends.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from twinkle_serve.control.backend import Invalid, NotFound
from twinkle_serve.control.promises import random_token
from twinkle_serve.storage.records import SessionRecord


@dataclass(slots=True)
class Session:
    """``models`` maps model_seq_id to (run id, request id of its creation); ``samplers`` maps
    sampling_session_seq_id to the sampler id. Both recognise what a client sends twice."""

    record: SessionRecord
    last_seen: float
    models: dict[int, tuple[str, str | None]] = field(default_factory=dict)
    samplers: dict[int, str] = field(default_factory=dict)


class Sessions:
    """All sessions of all tenants. ``save`` is called with each record that changed."""

    def __init__(
        self,
        expiry_s: float,
        save: Callable[[SessionRecord], object],
        new_token: Callable[[], str] = random_token,
    ) -> None:
        self._expiry_s = expiry_s
        self._save = save
        self._new_token = new_token
        self._sessions: dict[str, Session] = {}
        self._by_tenant: dict[str, list[str]] = {}
        self._active: dict[str, Session] = {}  # the longest silent first

    def create(self, tenant: str, info: Mapping[str, Any], now: float, session_id: str | None = None) -> str:
        """session_id: one that nobody has; None: a new one."""
        session_id = session_id or f"session-{self._new_token()}"
        assert session_id not in self._sessions
        record = SessionRecord(session_id, tenant, now, dict(info))
        self._save(record)
        self.restore(record, now)
        return session_id

    def restore(self, record: SessionRecord, now: float) -> None:
        """Take in a record. An active session gets a whole expiry to show that its client lives."""
        session = Session(record, now if record.silent_since is None else record.silent_since)
        self._sessions[record.session_id] = session
        self._by_tenant.setdefault(record.tenant, []).append(record.session_id)
        if record.status == "active":
            self._active[record.session_id] = session

    def get(self, tenant: str, session_id: str) -> Session:
        session = self._sessions.get(session_id)
        if session is None or session.record.tenant != tenant:
            raise NotFound(f"session {session_id!r} does not exist")
        return session

    @property
    def num_active(self) -> int:
        return len(self._active)

    def num_active_of(self, tenant: str) -> int:
        return sum(session.record.tenant == tenant for session in self._active.values())

    def exists(self, session_id: str) -> bool:
        return session_id in self._sessions

    def of_tenant(self, tenant: str) -> list[Session]:
        return [self._sessions[session_id] for session_id in self._by_tenant.get(tenant, [])]

    def info(self, tenant: str, session_id: str) -> Mapping[str, Any]:
        """What the tenant's session said of itself; nothing for a session that is not known."""
        session = self._sessions.get(session_id)
        return session.record.info if session is not None and session.record.tenant == tenant else {}

    def describe(self, tenant: str, session_id: str, words: Mapping[str, Any]) -> None:
        """Change what the session says of itself."""
        session = self.get(tenant, session_id)
        session.record = replace(session.record, info={**session.record.info, **words})
        self._save(session.record)

    def is_active(self, session_id: str) -> bool:
        """Whether its client is there, as far as anybody knows."""
        return session_id in self._active

    def is_finished(self, session_id: str) -> bool:
        return self._sessions[session_id].record.status == "finished"

    def last_seen(self, session_id: str) -> float:
        """When its client was last heard of, as far as this is known."""
        return self._sessions[session_id].last_seen

    def runs_of(self, session_id: str) -> list[str]:
        return [run_id for run_id, _ in self._sessions[session_id].models.values()]

    def usable(self, tenant: str, session_id: str, now: float) -> Session:
        """The session, if new runs and samplers may join it; using it counts as a sign of life."""
        session = self.get(tenant, session_id)
        if session.record.status == "finished":
            raise Invalid(f"session {session_id!r} is finished")
        self._touch(session, now)
        return session

    def heartbeat(self, tenant: str, session_id: str, now: float) -> bool:
        """False once the session is finished. An expired one comes back: a laptop was asleep."""
        session = self.get(tenant, session_id)
        if session.record.status == "finished":
            return False
        self._touch(session, now)
        return True

    def finish(self, tenant: str, session_id: str, reason: Mapping[str, Any]) -> bool:
        """The first reason stands; True if this one is it."""
        session = self.get(tenant, session_id)
        if session.record.status == "finished":
            return False
        self._set_status(session, "finished", reason)
        self._active.pop(session_id, None)
        return True

    def expire(self, now: float) -> Iterator[str]:
        """Mark the sessions that have been silent for too long, one by one; their ids. One that cannot be
        saved stays active, for the next time."""
        while self._active:
            session_id, session = next(iter(self._active.items()))
            if now - session.last_seen < self._expiry_s:
                break
            self._set_status(session, "expired", None, session.last_seen)
            del self._active[session_id]
            yield session_id

    def list(self, tenant: str, limit: int, offset: int) -> list[str]:
        """A page of the tenant's session ids, newest first."""
        return self._by_tenant.get(tenant, [])[::-1][offset : offset + limit]

    def _touch(self, session: Session, now: float) -> None:
        session_id = session.record.session_id
        session.last_seen = now
        if session.record.status == "expired":
            self._set_status(session, "active", None)
        self._active.pop(session_id, None)
        self._active[session_id] = session

    def _set_status(
        self,
        session: Session,
        status: str,
        reason: Mapping[str, Any] | None,
        silent_since: float | None = None,
    ) -> None:
        record = replace(session.record, status=status, finish_reason=reason, silent_since=silent_since)
        self._save(record)
        session.record = record
