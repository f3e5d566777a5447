"""Which sessions a search means, and how one is summed up.

Knows session records. Does not know whose sessions are searched.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from twinkle_serve.control.backend import SessionQuery
from twinkle_serve.control.usage import project_of
from twinkle_serve.control.views import text_values, timestamp
from twinkle_serve.storage.records import CheckpointRecord, SessionRecord


def place_of(record: SessionRecord) -> tuple[float, str]:
    """In the order of search results, which is downwards. Clients are shown microseconds."""
    return round(record.created_at, 6), record.session_id


def matches(record: SessionRecord, query: SessionQuery) -> bool:
    if query.after is not None and place_of(record) >= query.after:
        return False
    if query.project_ids is not None and project_of(record.info) not in query.project_ids:
        return False
    metadata = text_values(record.info.get("user_metadata") or {})
    if any(metadata.get(key) != value for key, value in query.user_metadata.items()):
        return False
    return _is_named(record, query) and _has_status(record, query)


def _is_named(record: SessionRecord, query: SessionQuery) -> bool:
    """Either by its id or by the words of its name, where both are given."""
    if query.session_id is None and query.display_name is None:
        return True
    if record.session_id == query.session_id:
        return True
    name = str(record.info.get("display_name") or "").lower()
    words = (query.display_name or "").lower().split()
    return bool(words) and all(word in name for word in words)


def _has_status(record: SessionRecord, query: SessionQuery) -> bool:
    if query.statuses is None:
        return True
    status = status_of(record)
    if status is None:
        return False
    reason = status.get("reason", {}).get("type")
    return any(
        kind == status["type"] and (reasons is None or reason in reasons) for kind, reasons in query.statuses
    )


def status_of(record: SessionRecord) -> dict[str, Any] | None:
    """As the SDK knows it; None for a session that went silent."""
    if record.status == "active":
        return {"type": "active"}
    if record.status != "finished":
        return None
    given = dict(record.finish_reason or {})
    kind = given.get("type")
    known = kind if kind in ("success", "errored", "interrupted") else "success"
    return {"type": "client_finished", "reason": {"type": known}, "detail": given.get("detail")}


def summary(record: SessionRecord, checkpoints: Sequence[CheckpointRecord]) -> dict[str, Any]:
    """The wire's SessionSummary."""
    return {
        "session_id": record.session_id,
        "created_at": timestamp(record.created_at),
        "owner": record.tenant,
        "project_id": project_of(record.info),
        "status": status_of(record),
        "checkpoints_count": len(checkpoints),
        "display_name": record.info.get("display_name"),
        "user_metadata": text_values(record.info.get("user_metadata") or {}),
        "checkpoint_storage_bytes": sum(checkpoint.size_bytes for checkpoint in checkpoints),
    }
