"""What tenants used, by the hour, and what was done to their checkpoints: kept in a database of its own.

Knows rows and times in POSIX seconds. Does not know what is counted or who may see it. Written every minute
or so, and for rare events; losing the last minute in a power cut loses nothing that anybody trained.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import sqlalchemy as sa

_metadata = sa.MetaData()
_usage = sa.Table(
    "usage",
    _metadata,
    sa.Column("tenant", sa.String(255), primary_key=True),
    sa.Column("hour", sa.Float, primary_key=True),
    sa.Column("session_id", sa.String(255), primary_key=True),
    sa.Column("base_model", sa.String(255), primary_key=True),
    sa.Column("kind", sa.String(32), primary_key=True),
    sa.Column("amount", sa.Float, nullable=False),
)
_events = sa.Table(
    "events",
    _metadata,
    sa.Column("number", sa.Integer, primary_key=True),
    sa.Column("tenant", sa.String(255), index=True, nullable=False),
    sa.Column("at", sa.Float, nullable=False),
    sa.Column("event", sa.String(64), nullable=False),
    sa.Column("details", sa.Text, nullable=False),
)


# By these old rows are found; an older ledger gets them when it is opened.
_INDEXES = (sa.Index("ix_usage_hour", _usage.c.hour), sa.Index("ix_events_at", _events.c.at))


class UsageKey(NamedTuple):
    """One line of a bill. hour: its beginning. session_id: "" where no session is meant."""

    tenant: str
    hour: float
    session_id: str
    base_model: str
    kind: str


@dataclass(frozen=True, slots=True)
class Event:
    at: float
    event: str
    details: Mapping[str, Any] = field(default_factory=dict)


class Ledger:
    """The ledger below one storage root. One writer."""

    def __init__(self, root: str | Path) -> None:
        self._engine = sa.create_engine(f"sqlite:///{Path(root) / 'ledger.sqlite'}")
        with self._engine.begin() as connection:
            _metadata.create_all(connection)
            for index in _INDEXES:
                index.create(connection, checkfirst=True)

    def close(self) -> None:
        self._engine.dispose()

    def add(self, amounts: Mapping[UsageKey, float]) -> None:
        """Add each amount to its line."""
        with self._engine.begin() as connection:
            for key, amount in amounts.items():
                same = [column == value for column, value in zip(_usage.primary_key, key, strict=True)]
                more = _usage.update().where(*same).values(amount=_usage.c.amount + amount)
                if not connection.execute(more).rowcount:
                    connection.execute(_usage.insert().values(**key._asdict(), amount=amount))

    def usage(self, tenant: str, since: float, until: float) -> list[tuple[UsageKey, float]]:
        """The tenant's lines of the hours that begin in [since, until), the oldest first."""
        query = sa.select(_usage).where(
            _usage.c.tenant == tenant, _usage.c.hour >= since, _usage.c.hour < until
        )
        with self._engine.connect() as connection:
            rows = connection.execute(query.order_by(_usage.c.hour, _usage.c.amount.desc()))
            return [(UsageKey(*row[:-1]), row[-1]) for row in rows]

    def note(self, events: Iterable[tuple[str, Event]]) -> None:
        """Each with its tenant; all or none."""
        rows = [
            {"tenant": tenant, "at": event.at, "event": event.event, "details": json.dumps(event.details)}
            for tenant, event in events
        ]
        if rows:
            with self._engine.begin() as connection:
                connection.execute(_events.insert(), rows)

    def events(
        self, tenant: str, since: float, until: float, event: str | None = None, limit: int | None = None
    ) -> list[Event]:
        """Of the tenant, in [since, until), the oldest first; the last ``limit`` only. event: None: all."""
        query = sa.select(_events.c.at, _events.c.event, _events.c.details).where(
            _events.c.tenant == tenant, _events.c.at >= since, _events.c.at < until
        )
        if event is not None:
            query = query.where(_events.c.event == event)
        with self._engine.connect() as connection:
            rows = connection.execute(query.order_by(_events.c.number.desc()).limit(limit)).all()
        return [Event(at, name, json.loads(details)) for at, name, details in reversed(rows)]

    def forget(self, before: float) -> None:
        """Drop what is older."""
        with self._engine.begin() as connection:
            connection.execute(_usage.delete().where(_usage.c.hour < before))
            connection.execute(_events.delete().where(_events.c.at < before))
