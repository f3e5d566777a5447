"""The losses that clients uploaded: whose each is, and how many are kept.

Knows ids, owners and sessions. Does not know what is in a loss: a request that uses one carries it along, so
that nothing here is needed to do the request again.
"""

from __future__ import annotations

from collections.abc import Callable

from twinkle_serve.control.backend import NotFound
from twinkle_serve.storage.records import LossRecord

PER_TENANT = 256
"""Clients never delete a loss. Beyond this the oldest one goes, first of all those of other sessions."""


def loss_id_for(session_id: str, custom_loss_seq_id: int) -> str:
    return f"{session_id}:loss:{custom_loss_seq_id}"


class CustomLosses:
    """All uploaded losses of all tenants. ``save`` and ``remove`` keep the catalogue in step."""

    def __init__(self, save: Callable[[LossRecord], object], remove: Callable[[str], object]) -> None:
        self._save = save
        self._remove = remove
        self._losses: dict[str, LossRecord] = {}

    def restore(self, record: LossRecord) -> None:
        self._losses[record.loss_id] = record

    def find(self, loss_id: str) -> LossRecord | None:
        return self._losses.get(loss_id)

    def get(self, tenant: str, loss_id: str) -> LossRecord:
        """Raises NotFound, also for another tenant's."""
        record = self._losses.get(loss_id)
        if record is None or record.tenant != tenant:
            raise NotFound(f"loss_id {loss_id[:200]!r} does not exist; create_custom_loss gives one")
        return record

    def add(self, record: LossRecord) -> None:
        own = [each for each in self._losses.values() if each.tenant == record.tenant]
        own.sort(key=lambda each: (each.session_id == record.session_id, each.created_at))
        for oldest in own[: max(0, len(own) + 1 - PER_TENANT)]:
            self._drop(oldest)
        self._save(record)
        self._losses[record.loss_id] = record

    def end_session(self, session_id: str) -> None:
        """Nobody will name its losses any more."""
        for record in [each for each in self._losses.values() if each.session_id == session_id]:
            self._drop(record)

    def _drop(self, record: LossRecord) -> None:
        self._remove(record.loss_id)
        del self._losses[record.loss_id]
