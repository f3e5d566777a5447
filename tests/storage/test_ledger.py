from __future__ import annotations

import sqlite3
from pathlib import Path

from twinkle_serve.storage.ledger import Event, Ledger, UsageKey


def key(tenant: str = "a", hour: float = 0.0, kind: str = "training") -> UsageKey:
    return UsageKey(tenant, hour, "session-1", "base", kind)


def test_amounts_add_up_also_after_a_restart(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    ledger.add({key(): 2.0, key(hour=3600.0): 1.0, key("b"): 9.0})
    ledger.add({key(): 3.0})
    ledger.close()
    ledger = Ledger(tmp_path)
    assert ledger.usage("a", 0, 7200) == [(key(), 5.0), (key(hour=3600.0), 1.0)]
    assert ledger.usage("a", 0, 3600) == [(key(), 5.0)]
    assert ledger.usage("c", 0, 7200) == []
    ledger.close()


def test_events_are_the_tenants_own_and_old_ones_go(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    ledger.note(
        (tenant, Event(at, "checkpoint_read", {"n": at}))
        for tenant, at in (("a", 1.0), ("b", 2.0), ("a", 3.0))
    )
    ledger.note([])
    assert [event.at for event in ledger.events("a", 0, 10)] == [1.0, 3.0]
    ledger.add({key(hour=1.0): 1.0, key(hour=5.0): 1.0})
    ledger.forget(2.5)
    assert [event.details for event in ledger.events("a", 0, 10)] == [{"n": 3.0}]
    assert [line.hour for line, _ in ledger.usage("a", 0, 10)] == [5.0]
    ledger.close()


def test_of_many_events_the_last_are_shown_in_their_order(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    ledger.note(("a", Event(float(at), "read" if at % 2 else "created")) for at in range(10))
    assert [event.at for event in ledger.events("a", 0, 10, limit=3)] == [7.0, 8.0, 9.0]
    assert [event.at for event in ledger.events("a", 0, 10, "created", 2)] == [6.0, 8.0]
    ledger.close()


def test_a_ledger_without_indexes_gets_them(tmp_path: Path) -> None:
    Ledger(tmp_path).close()
    with sqlite3.connect(tmp_path / "ledger.sqlite") as connection:
        connection.execute("DROP INDEX ix_events_at")
    connection.close()
    for _ in range(2):
        Ledger(tmp_path).close()
    with sqlite3.connect(tmp_path / "ledger.sqlite") as connection:
        plan = connection.execute("EXPLAIN QUERY PLAN DELETE FROM events WHERE at < 1").fetchall()
    connection.close()
    assert "ix_events_at" in str(plan)
