"""How it stands, in numbers and words: for gauges, for the owner of a run, and for who operates the service.

Knows which part of the control plane to ask for what. Changes nothing.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from twinkle_serve.control.books import Books
from twinkle_serve.control.driver import GroupDriver
from twinkle_serve.control.keeper import Keeper
from twinkle_serve.control.metrics import BY_NAME, tenant_hash
from twinkle_serve.control.runs import Run
from twinkle_serve.control.views import timestamp

_OF_RANK = re.compile(r"rank(\d+)/(\w+)_bytes")
"""How an engine names what a rank keeps in memory (Engine.memory)."""

Drivers = Mapping[str, GroupDriver]
_MAX_TENANTS_SHOWN = 50


def in_words(position: int, seconds: float | None) -> str:
    """For ``queue_state_reason``: "position 3, ~40 s"."""
    words = f"position {position}"
    return words if seconds is None else f"{words}, ~{max(1, math.ceil(seconds))} s"


def gap_in_words(run: Run, seq_id: int | None) -> str | None:
    """Why a request waits although nobody is before it: an earlier one of its run has not come."""
    missing = run.log.missing
    if missing is None or seq_id is None or seq_id <= missing:
        return None
    return f"waits for the run's request with seq_id {missing}, which has not arrived"


def measure(books: Books, drivers: Drivers, keeper: Keeper | None) -> None:
    """Set the gauges."""
    meter, now = books.watch.meter, books.clock.now()
    for group, driver in drivers.items():
        for name, value in driver.gauges().items():
            use = _OF_RANK.fullmatch(name)
            if use is not None:
                meter.set("rank_memory_bytes", value, model=group, rank=use[1], kind=use[2])
            elif name in BY_NAME:
                meter.set(name, value, model=group)
        mfu = books.watch.mfu(group)
        if mfu is not None:
            meter.set("mfu_ratio", mfu, model=group)
        changed = None if keeper is None else keeper.oldest_change(group)
        meter.set("snapshot_age_seconds", 0.0 if changed is None else max(0.0, now - changed), model=group)
    pending = books.promises.num_pending
    meter.set("promises", pending, state="pending")
    meter.set("promises", len(books.promises) - pending, state="kept")
    meter.set("sessions", books.sessions.num_active)
    meter.set("journal_lag_seconds", _journal_lag(books, keeper))
    meter.set("journal_bytes", 0.0 if keeper is None else keeper.journal.num_bytes)


def _journal_lag(books: Books, keeper: Keeper | None) -> float:
    oldest = None if keeper is None else keeper.oldest_unwritten
    accepted_at = None if oldest is None else books.watch.accepted_at(oldest)
    return 0.0 if accepted_at is None else max(0.0, books.clock.now() - accepted_at)


def run_insight(books: Books, driver: GroupDriver | None, run: Run, curves: bool) -> dict[str, Any]:
    """A run's numbers and, if asked for, its curves; and what it is doing. driver: None if its base model
    is not served."""
    return {**books.watch.histories.of(run.run_id).view(curves), "status": _run_status(driver, run)}


def _run_status(driver: GroupDriver | None, run: Run) -> dict[str, Any]:
    """state: unloaded, corrupted, not_served (its base model), waiting (with position and seconds), gap (with
    the seq_id that is missing), working, idle (in a slot), paged, or asleep (on disk or without an adapter).
    """
    status: dict[str, Any] = {"num_waiting": len(run.log.ready) + len(run.log.parked)}
    standing = None if driver is None else driver.run_standing(run)
    if run.record.unloaded:
        state = "unloaded"
    elif run.record.corrupted:
        state = "corrupted"
    elif driver is None:
        state = "not_served"
    elif driver.is_working_for(run.run_id):
        state = "working"
    elif standing is not None:
        state = "waiting"
        status["position"], status["seconds"] = standing
        status["reason"] = in_words(*standing)
    elif run.log.missing is not None:
        state = "gap"
        status["missing"] = run.log.missing
    elif driver.residency.slot_of(run.run_id) is not None:
        state = "idle"
    else:
        state = "paged" if driver.residency.knows(run.run_id) else "asleep"
    return {"state": state, **status}


def cluster_view(books: Books, drivers: Drivers, keeper: Keeper | None) -> dict[str, Any]:
    """The whole service as its operator sees it: tenants by hash, nobody's data."""
    return {
        "models": [_group_view(books, driver) for driver in drivers.values()],
        "sessions": books.sessions.num_active,
        "promises": {
            "pending": books.promises.num_pending,
            "kept": len(books.promises) - books.promises.num_pending,
        },
        "journal": {
            "lag_seconds": _journal_lag(books, keeper),
            "bytes": 0 if keeper is None else keeper.journal.num_bytes,
            "stalled": None if keeper is None else keeper.journal.stalled,
        },
    }


def _group_view(books: Books, driver: GroupDriver) -> dict[str, Any]:
    watch, group = books.watch, driver.name
    info = driver.group.info
    tokens = sorted(watch.tenant_tokens(group).items(), key=lambda item: -item[1])
    total = sum(amount for _, amount in tokens)
    return {
        "name": group,
        "arch": info.arch,
        "healthy": driver.healthy,
        "num_slots": info.max_slots,
        "slots": [
            {"slot": slot, "run": _anonymous(books, run_id)} for slot, run_id in driver.residency.occupied()
        ],
        "num_ticks": watch.num_ticks(group),
        "recoveries": [timestamp(at) for at in watch.recoveries(group)],
        "gauges": driver.gauges(),
        "shares": [
            {"tenant": tenant, "tokens": amount, "share": amount / total if total else 0.0}
            for tenant, amount in tokens[:_MAX_TENANTS_SHOWN]
        ],
    }


def _anonymous(books: Books, run_id: str) -> str:
    """Whose run it is, not which: ids belong to their tenants."""
    run = books.runs.find(run_id)
    return tenant_hash(run.tenant) if run is not None else ""
