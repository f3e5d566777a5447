"""The catalogue without a database, for the thousands of short lives of the simulator."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from twinkle_serve.storage.catalog import Contents


class MemoryCatalog:
    """storage.catalog.Catalog that forgets when it is dropped."""

    def __init__(self) -> None:
        self._sessions: dict[Any, Any] = {}
        self._runs: dict[Any, Any] = {}
        self._samplers: dict[Any, Any] = {}
        self._losses: dict[Any, Any] = {}
        self._checkpoints: dict[Any, Any] = {}

    def put_session(self, record: Any) -> None:
        self._sessions[record.session_id] = record

    def put_run(self, record: Any) -> None:
        self._runs[record.run_id] = record

    def put_sampler(self, record: Any) -> None:
        self._samplers[record.sampler_id] = record

    def put_loss(self, record: Any) -> None:
        self._losses[record.loss_id] = record

    def delete_loss(self, loss_id: str) -> None:
        del self._losses[loss_id]

    def put_checkpoint(self, record: Any) -> None:
        self._checkpoints[record.run_id, record.kind, record.name] = record

    def delete_checkpoint(self, run_id: str, kind: str, name: str) -> None:
        del self._checkpoints[run_id, kind, name]

    def set_checkpoint(self, run_id: str, kind: str, name: str, **changes: Any) -> None:
        key = run_id, kind, name
        self._checkpoints[key] = replace(self._checkpoints[key], **changes)

    def load_all(self) -> Contents:
        tables = (self._sessions, self._runs, self._samplers, self._checkpoints, self._losses)
        return Contents(*(tuple(table.values()) for table in tables))

    def directory_for(self, run_id: str, kind: str, name: str) -> str:
        return f"/nowhere/{run_id}/{kind}/{name}"

    def remove_directory(self, directory: str) -> None:
        pass

    def mark_deleted(self, directory: str, is_deleted: bool = True) -> None:
        pass

    def close(self) -> None:
        pass
