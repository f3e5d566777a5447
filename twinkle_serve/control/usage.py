"""Counts what each tenant uses, for its bill and its audit log; both are written to a ledger now and then.

Knows kinds of usage and hours. Does not know limits (quotas.py), prices, or who else measures the same
(watch.py, which tells it about tokens).
"""

from __future__ import annotations

import logging
from collections import Counter, deque
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

from twinkle_serve.control.checkpoints import Checkpoints, Key, key_of, path_of
from twinkle_serve.control.clock import Clock
from twinkle_serve.control.sessions import Sessions
from twinkle_serve.control.views import text_values, timestamp
from twinkle_serve.storage.ledger import Event, Ledger, UsageKey
from twinkle_serve.storage.records import CheckpointRecord

logger = logging.getLogger(__name__)

HOUR_S, DAY_S = 3600.0, 86_400.0
_KEPT_S = 100 * DAY_S
_WRITE_EVERY_S = 60.0
_GIGABYTE = 1e9
# Events that are not written yet; if there are more, the oldest are lost.
_MAX_UNNOTED = 10_000
# So many of a day are shown, the newest.
MAX_SHOWN = 5_000
# What Watch calls tokens, and the bill's word for them.
_TOKENS = {
    "train": "training",
    "forward": "training",
    "prompt": "sampling_prefill",
    "sampled": "sampling_sample",
}


class Usage:
    """Of all tenants. Without a ledger nothing is kept."""

    def __init__(
        self, ledger: Ledger | None, clock: Clock, sessions: Sessions, checkpoints: Checkpoints
    ) -> None:
        self._ledger = ledger
        self._clock = clock
        self._sessions = sessions
        self._checkpoints = checkpoints
        self._unwritten: Counter[UsageKey] = Counter()
        self._unnoted: deque[tuple[str, Event]] = deque(maxlen=_MAX_UNNOTED)
        self._reads: set[tuple[Key, bool]] = set()  # of this hour: what was read, and whether by others
        self._written_at = self._forgot_at = clock.now()

    # what happens ---------------------------------------------------------------------------------

    def tokens(self, tenant: str, session_id: str, base_model: str, kind: str, amount: int) -> None:
        """kind: as in the table of metrics."""
        self._count(tenant, session_id, base_model, _TOKENS[kind], amount)

    def checkpoint(self, event: str, record: CheckpointRecord, by: str | None = None) -> None:
        """event: created, deleted, expired, published, unpublished or read. by: another tenant."""
        if event == "created":
            session_id = record.run_id.partition(":")[0]
            self._count(record.tenant, session_id, record.base_model, "checkpoint", 1)
        is_foreign = by is not None and by != record.tenant
        if self._ledger is None or (event == "read" and self._was_read(record, is_foreign)):
            return
        details: dict[str, Any] = {"tinker_path": path_of(key_of(record)), "model_id": record.run_id}
        if is_foreign:
            details["by"] = "another tenant"
        # Written with the next sweep: a read costs nothing on disk, and is nobody's way to stop the others.
        self._unnoted.append((record.tenant, Event(self._clock.now(), f"checkpoint_{event}", details)))

    def _was_read(self, record: CheckpointRecord, is_foreign: bool) -> bool:
        """Whether that is in the log for this hour already: a download asks for each file, and each part."""
        read = (key_of(record), is_foreign)
        known = read in self._reads
        self._reads.add(read)
        return known

    def sweep(self) -> None:
        """To be called every few seconds."""
        self._note()
        if self._clock.now() - self._written_at >= _WRITE_EVERY_S:
            self.write()

    def write(self) -> None:
        """Bring what was counted to the ledger, and what lay on disk meanwhile."""
        self._note()
        now = self._clock.now()
        for tenant in list(self._checkpoints.sizes):
            self._unwritten[self._storage_key(tenant)] += self._stored(tenant)  # type: ignore[assignment]
        self._written_at = now
        if self._ledger is None:
            self._unwritten.clear()
        elif self._unwritten:
            self._ledger.add({key: amount for key, amount in self._unwritten.items() if amount})
            self._unwritten.clear()  # not before: what could not be written is written next time
        if now - self._forgot_at >= HOUR_S:
            self._forgot_at = now
            self._reads.clear()
            if self._ledger is not None:
                self._ledger.forget(now - _KEPT_S)

    def _note(self) -> None:
        """Whatever becomes of it, what is noted was done and stays done."""
        try:
            if self._ledger is not None and self._unnoted:
                self._ledger.note(self._unnoted)
                self._unnoted.clear()
        except Exception as error:
            logger.error("%d events are not in the audit log yet: %s", len(self._unnoted), error)

    def _storage_key(self, tenant: str) -> UsageKey:
        return UsageKey(tenant, self._clock.now() // HOUR_S * HOUR_S, "", "", "storage")

    def _stored(self, tenant: str) -> float:
        """Gigabyte hours since the last time that they were counted."""
        hours = (self._clock.now() - self._written_at) / HOUR_S
        return hours * self._checkpoints.sizes[tenant] / _GIGABYTE

    def _count(self, tenant: str, session_id: str, base_model: str, kind: str, amount: float) -> None:
        if amount:
            hour = self._clock.now() // HOUR_S * HOUR_S
            self._unwritten[UsageKey(tenant, hour, session_id, base_model, kind)] += amount  # type: ignore[assignment]

    # what was used --------------------------------------------------------------------------------

    def bill(self, tenant: str, since: float, until: float) -> dict[str, Any]:
        """The wire's BillingUsageResponse for the hours that begin in [since, until); no prices."""
        lines = self._lines(tenant, since, until)
        sessions = {key.session_id: self._describe(tenant, key.session_id) for key, _ in lines}
        sessions.pop("", None)
        data = [self._line(key, amount, sessions.get(key.session_id)) for key, amount in lines]
        shown = {name: {"user_metadata": found["user_metadata"]} for name, found in sessions.items()}
        return {"data": data, "sessions": shown}

    def _lines(self, tenant: str, since: float, until: float) -> list[tuple[UsageKey, float]]:
        """What is written, and what will be: to ask writes nothing."""
        if self._ledger is None:
            return []
        amounts = dict(self._ledger.usage(tenant, since, until))
        waiting = {key: float(amount) for key, amount in self._unwritten.items() if key.tenant == tenant}
        storage = self._storage_key(tenant)
        waiting[storage] = waiting.get(storage, 0.0) + self._stored(tenant)
        for key, amount in waiting.items():
            if since <= key.hour < until and amount:
                amounts[key] = amounts.get(key, 0.0) + amount
        return sorted(amounts.items(), key=lambda line: (line[0].hour, -line[1]))

    def storage(self, tenant: str, project_id: str | None) -> dict[str, Any]:
        """The wire's CurrentCheckpointStorageUsageResponse: one item a project."""
        counts: Counter[str] = Counter()
        sizes: Counter[str] = Counter()
        for record in self._checkpoints.of_tenant(tenant):
            project = str(self._describe(tenant, record.run_id.partition(":")[0])["project_id"])
            counts[project] += 1
            sizes[project] += record.size_bytes
        return {
            "data": [
                {
                    "project_id": project,
                    "org_user_urn": tenant,
                    "checkpoint_count": count,
                    "size_bytes": sizes[project],
                    "size_gigabytes": sizes[project] / _GIGABYTE,
                }
                for project, count in counts.items()
                if project_id in (None, project)
            ]
        }

    def audit(self, tenant: str, day: str | None, event_type: str) -> list[dict[str, Any]]:
        """What was done to the tenant's checkpoints on a day (YYYY-MM-DD, UTC; None: today), the last
        MAX_SHOWN."""
        if self._ledger is None:
            return []
        now = datetime.fromtimestamp(self._clock.now(), UTC).date().isoformat()
        start = datetime.fromisoformat(f"{day or now}T00:00:00+00:00").timestamp()
        kind = None if event_type == "all" else event_type
        found = self._ledger.events(tenant, start, start + DAY_S, kind, MAX_SHOWN)
        found += [
            event
            for owner, event in self._unnoted
            if owner == tenant and start <= event.at < start + DAY_S and kind in (None, event.event)
        ]
        return [
            {"timestamp": timestamp(event.at), "event": event.event, "event_details": dict(event.details)}
            for event in found[-MAX_SHOWN:]
        ]

    def _line(self, key: UsageKey, amount: float, session: Mapping[str, Any] | None) -> dict[str, Any]:
        info: dict[str, Any] = {"type": key.kind}
        match key.kind:
            case "storage":
                info |= {"free": False, "gigabyte_hours": amount}
            case "checkpoint":
                info |= {"count": round(amount)}
            case _:
                info |= {"token_count": round(amount)}
        if key.kind == "sampling_prefill":
            info["cached"] = False
        line = {
            "bucket_start": timestamp(key.hour),
            "bucket_end": timestamp(key.hour + HOUR_S),
            "user_id": key.tenant,
            "event_info": info,
        }
        if key.base_model:
            line["base_model"] = key.base_model
        if session is not None:
            line |= {"session_id": key.session_id, "project_id": session["project_id"]}
        return line

    def _describe(self, tenant: str, session_id: str) -> dict[str, Any]:
        info = self._sessions.info(tenant, session_id)
        return {"project_id": project_of(info), "user_metadata": text_values(info.get("user_metadata") or {})}


DEFAULT_PROJECT = "default"


def project_of(info: Mapping[str, Any]) -> str:
    """The project that a session is in. Projects are names that clients give; nothing else is in them."""
    return str(info.get("project_id") or DEFAULT_PROJECT)
