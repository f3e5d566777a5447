"""The part of the Backend that is about what is on record: sessions, runs and checkpoints, nothing running.

Knows the registries and their wire views. Does not know groups, ticks or promises (service.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from twinkle_serve.control.backend import Invalid
from twinkle_serve.control.books import Books
from twinkle_serve.control.runs import Run
from twinkle_serve.control.spans import chrome_trace
from twinkle_serve.control.views import checkpoint_view, run_view, text_values, weights_view
from twinkle_serve.protocol.errors import UserError
from twinkle_serve.storage.records import CheckpointRecord


class OnRecord:
    """See control.backend.Backend for what each method promises."""

    def __init__(self, books: Books) -> None:
        self._books = books

    async def list_sessions(self, tenant: str, limit: int, offset: int) -> list[str]:
        return self._books.sessions.list(tenant, limit, offset)

    async def get_session(self, tenant: str, session_id: str) -> Mapping[str, Any]:
        session = self._books.sessions.get(tenant, session_id)
        info = session.record.info
        return {
            "training_run_ids": [run_id for run_id, _ in session.models.values()],
            "sampler_ids": self._books.samplers.of_session(session_id),
            "user_metadata": text_values(info.get("user_metadata") or {}),
            "display_name": info.get("display_name"),
        }

    async def session_trace(self, tenant: str, session_id: str) -> Mapping[str, Any]:
        self._books.sessions.get(tenant, session_id)
        return chrome_trace(self._books.watch.spans.of_session(session_id))

    async def report_metrics(
        self, tenant: str, run_id: str, step: float | None, values: Mapping[str, float]
    ) -> None:
        run = self._books.runs.get(tenant, run_id)
        self._books.watch.histories.of(run.run_id).report(step, self._books.clock.now(), values)

    async def custom_loss(self, tenant: str, loss_id: str) -> str:
        return self._books.losses.get(tenant, loss_id).graph

    async def get_run(self, tenant: str, run_id: str) -> Mapping[str, Any]:
        return self._run_view(self._books.runs.get(tenant, run_id))

    async def list_checkpoints(
        self, tenant: str, run_id: str | None, limit: int | None, offset: int
    ) -> tuple[list[Mapping[str, Any]], int]:
        if run_id is None:
            records = self._books.checkpoints.of_tenant(tenant)
        else:
            records = self._books.checkpoints.of_run(self._books.runs.get(tenant, run_id).run_id)
        end = None if limit is None else offset + limit
        return [checkpoint_view(record) for record in records[offset:end]], len(records)

    async def weights_info(self, tenant: str, path: str) -> Mapping[str, Any]:
        record = self._books.checkpoints.find(tenant, path)
        return weights_view(record.base_model, record.spec)

    async def delete_checkpoint(self, tenant: str, path: str) -> None:
        self._books.checkpoints.delete(self._owned(tenant, path))

    async def publish_checkpoint(self, tenant: str, path: str, public: bool) -> None:
        self._books.checkpoints.publish(self._owned(tenant, path), public)

    async def set_checkpoint_ttl(self, tenant: str, path: str, ttl_seconds: int | None) -> None:
        try:
            self._books.checkpoints.set_ttl(self._owned(tenant, path), ttl_seconds, self._books.clock.now())
        except UserError as error:
            raise Invalid(str(error)) from None

    async def checkpoint_files(self, tenant: str, path: str, owned: bool = False) -> Mapping[str, str]:
        record = self._owned(tenant, path) if owned else self._books.checkpoints.find(tenant, path)
        self._books.usage.checkpoint("read", record, by=tenant)
        return self._books.checkpoints.files(record)

    def _owned(self, tenant: str, path: str) -> CheckpointRecord:
        return self._books.checkpoints.owned(tenant, path)

    def _run_view(self, run: Run) -> Mapping[str, Any]:
        return run_view(run.record, self._books.checkpoints.of_run(run.run_id))
