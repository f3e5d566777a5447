"""API keys that this server gives out: who each belongs to, and whether it still counts.

Keeps keyed hashes only, so a stolen database opens nothing. Knows names, tenants and dates. Does not know
HTTP, or how long an answer may be remembered (gateway/identity.py).
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
import time
from dataclasses import dataclass
from pathlib import Path

import sqlalchemy as sa

from twinkle_serve.storage.secret import shared_secret

PREFIX = "tml-"
"""What the tinker SDK wants a key to begin with."""

_metadata = sa.MetaData()
_keys = sa.Table(
    "keys",
    _metadata,
    sa.Column("digest", sa.String(64), primary_key=True),
    sa.Column("name", sa.String(255), nullable=False),
    sa.Column("tenant", sa.String(64), nullable=False),
    sa.Column("created_at", sa.Float, nullable=False),
    sa.Column("revoked_at", sa.Float),
)


@dataclass(frozen=True, slots=True)
class KeyRecord:
    """One key; times in seconds since the epoch. ``revoked_at`` None: it counts."""

    name: str
    tenant: str
    created_at: float
    revoked_at: float | None


class KeyStore:
    """The keys below one storage root. Every process of a deployment may have one open."""

    def __init__(self, root: str | Path) -> None:
        self._secret = shared_secret(root)
        self._engine = sa.create_engine(f"sqlite:///{Path(root) / 'keys.sqlite'}")
        with self._engine.begin() as connection:
            _metadata.create_all(connection)

    def close(self) -> None:
        self._engine.dispose()

    def create(self, name: str) -> str:
        """A new tenant called ``name`` and its key, which is told this once.

        Raises ValueError if the name is empty or has a key already.
        """
        if not name.strip():
            raise ValueError("a key needs a name")
        with self._engine.begin() as connection:
            if self._current(connection, name) is not None:
                raise ValueError(f"{name!r} has a key already; rotate or revoke it")
            return self._insert(connection, name, f"key-{secrets.token_hex(8)}")

    def rotate(self, name: str) -> str:
        """A new key for the tenant of ``name`` instead of the old one. Raises ValueError as ``revoke``."""
        with self._engine.begin() as connection:
            record = self._current(connection, name)
            if record is None:
                raise ValueError(f"{name!r} has no key")
            self._revoke(connection, name)
            return self._insert(connection, name, record.tenant)

    def revoke(self, name: str) -> None:
        """The key of ``name`` counts no more. Raises ValueError for an unknown name."""
        with self._engine.begin() as connection:
            if not self._revoke(connection, name):
                raise ValueError(f"{name!r} has no key")

    def revoke_key(self, key: str) -> None:
        """The key itself counts no more; nothing happens if it did not."""
        change = _keys.update().where(_keys.c.digest == self._digest(key), _keys.c.revoked_at.is_(None))
        with self._engine.begin() as connection:
            connection.execute(change.values(revoked_at=time.time()))

    def list(self) -> list[KeyRecord]:
        """All keys there ever were, oldest first."""
        with self._engine.connect() as connection:
            rows = connection.execute(sa.select(*_columns()).order_by(_keys.c.created_at))
            return [KeyRecord(*row) for row in rows]

    def find(self, key: str) -> KeyRecord | None:
        """Whose key this is; None if it is not one of ours or was revoked."""
        query = sa.select(*_columns()).where(
            _keys.c.digest == self._digest(key), _keys.c.revoked_at.is_(None)
        )
        with self._engine.connect() as connection:
            row = connection.execute(query).one_or_none()
        return None if row is None else KeyRecord(*row)

    def _digest(self, key: str) -> str:
        return hmac.new(self._secret, key.encode("utf-8", "surrogateescape"), hashlib.sha256).hexdigest()

    def _insert(self, connection: sa.Connection, name: str, tenant: str) -> str:
        key = PREFIX + secrets.token_urlsafe(32)
        values = {"digest": self._digest(key), "name": name, "tenant": tenant, "created_at": time.time()}
        connection.execute(_keys.insert().values(values))
        return key

    def _current(self, connection: sa.Connection, name: str) -> KeyRecord | None:
        query = sa.select(*_columns()).where(_keys.c.name == name, _keys.c.revoked_at.is_(None))
        row = connection.execute(query).one_or_none()
        return None if row is None else KeyRecord(*row)

    def _revoke(self, connection: sa.Connection, name: str) -> bool:
        query = _keys.update().where(_keys.c.name == name, _keys.c.revoked_at.is_(None))
        return connection.execute(query.values(revoked_at=time.time())).rowcount > 0


def _columns() -> tuple[sa.Column[str], sa.Column[str], sa.Column[float], sa.Column[float]]:
    return _keys.c.name, _keys.c.tenant, _keys.c.created_at, _keys.c.revoked_at
