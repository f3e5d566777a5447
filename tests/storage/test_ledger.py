from __future__ import annotations

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
    for tenant, at in (("a", 1.0), ("b", 2.0), ("a", 3.0)):
        ledger.note(tenant, Event(at, "checkpoint_read", {"n": at}))
    assert [event.at for event in ledger.events("a", 0, 10)] == [1.0, 3.0]
    ledger.add({key(hour=1.0): 1.0, key(hour=5.0): 1.0})
    ledger.forget(2.5)
    assert [event.details for event in ledger.events("a", 0, 10)] == [{"n": 3.0}]
    assert [line.hour for line, _ in ledger.usage("a", 0, 10)] == [5.0]
    ledger.close()
