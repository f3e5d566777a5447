"""Looking after what is on record: copies of checkpoints, projects, search, bills and the audit log.

Knows sessions, runs and checkpoints by their registries. Does not know groups, ticks or promises
(service.py), nor what a listing looks like (on_record.py).
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from twinkle_serve.control.backend import Invalid, SessionQuery
from twinkle_serve.control.books import Books
from twinkle_serve.control.checkpoints import Key, check_ttl, key_of, path_of
from twinkle_serve.control.on_record import OnRecord
from twinkle_serve.control.runs import run_id_for
from twinkle_serve.control.search import matches, place_of, summary
from twinkle_serve.control.usage import project_of
from twinkle_serve.protocol.errors import BackendUnavailable, Busy, UserError
from twinkle_serve.protocol.work import Failure
from twinkle_serve.storage.checkpoints import CheckpointError, read_manifest
from twinkle_serve.storage.records import CheckpointRecord, RunRecord

logger = logging.getLogger(__name__)


class Management(OnRecord):
    """See control.backend.Backend for what each method promises. no_room_for_a_copy: why none may be made."""

    def __init__(self, books: Books) -> None:
        super().__init__(books)
        self.no_room_for_a_copy: Callable[[], Failure | None] = lambda: None
        self._turns: dict[str, asyncio.Lock] = defaultdict(asyncio.Lock)

    async def copy_checkpoint(
        self,
        tenant: str,
        path: str,
        place: tuple[str, int] | None,
        project_id: str | None,
        ttl_seconds: int | None,
        once: str,
    ) -> str:
        try:
            check_ttl(ttl_seconds)
        except UserError as error:
            raise Invalid(str(error)) from None
        books = self._books
        source = books.checkpoints.find(tenant, path)
        session_id, number = place or (self._archive(tenant, project_id, once), 0)
        books.sessions.get(tenant, session_id)
        key: Key = (run_id_for(session_id, number), source.kind, source.name)
        listed = books.checkpoints.at(key)
        if listed is not None:
            if not _are_same(listed, source):
                raise Invalid(f"model_seq_id {number} of session {session_id!r} is taken")
            return path_of(key)  # sent twice
        if books.checkpoints.is_saving(path_of(key)):
            raise BackendUnavailable("this copy is being made; ask again")
        self._check_not_replaced(source)
        self._check_free(source, session_id, number)
        books.quotas.check_checkpoints(tenant)
        no_room = self.no_room_for_a_copy()
        if no_room is not None:
            raise Busy(no_room.message)
        await self._copy(source, tenant, session_id, number, key, ttl_seconds)
        return path_of(key)

    async def _copy(
        self,
        source: CheckpointRecord,
        tenant: str,
        session_id: str,
        number: int,
        key: Key,
        ttl_seconds: int | None,
    ) -> None:
        """The files are linked, not written again. The new run holds the copy and cannot be trained."""
        books, now = self._books, self._books.clock.now()
        held = tenant, source.size_bytes
        directory = books.checkpoints.reserve(*key, overwrite=False, held=held)
        try:
            size = await self._copy_files(source, tenant, directory)
            self._check_free(source, session_id, number)
            self._make_holder(source, tenant, session_id, number, now)
        except BaseException:
            books.checkpoints.discard(key, directory)
            raise
        expires_at = None if ttl_seconds is None else now + ttl_seconds
        copy = replace(
            source,
            run_id=key[0],
            tenant=tenant,
            directory=directory,
            created_at=now,
            expires_at=expires_at,
            public=False,
            seq_id=None,
        )
        assert key_of(copy) == key
        books.checkpoints.commit(copy, size)

    async def _copy_files(self, source: CheckpointRecord, tenant: str, directory: str) -> int:
        """The size of what is at ``directory`` then: what the save wrote that ``source`` is the record of."""
        checkpoints = self._books.checkpoints
        checkpoints.pin(source.directory)
        try:
            async with self._turns[tenant]:  # one at a time: hashing takes long, and threads are for all
                size = await asyncio.to_thread(checkpoints.copy_files, source, directory)
        except CheckpointError as error:
            self._check_not_replaced(source)
            path = path_of(key_of(source))
            logger.error("%s is not copied: %s", path, error)
            raise Invalid(f"{path} cannot be copied: its files are damaged") from None
        finally:
            checkpoints.unpin(source.directory)
        self._check_not_replaced(source)
        return size

    def _check_not_replaced(self, source: CheckpointRecord) -> None:
        key = key_of(source)
        listed = self._books.checkpoints.at(key)
        is_other = listed is not None and listed.seq_id != source.seq_id
        if is_other or self._books.checkpoints.is_saving(path_of(key)):
            raise BackendUnavailable(f"{path_of(key)} is being saved anew; ask again")

    def _check_free(self, source: CheckpointRecord, session_id: str, number: int) -> None:
        """Raises Invalid unless a copy of ``source`` may have that number: nobody has it, or a copy had that
        failed when all but its listing was done."""
        run = self._books.runs.find(run_id_for(session_id, number))
        if run is not None and not self._is_left_over(run.record, source):
            raise Invalid(f"model_seq_id {number} of session {session_id!r} is taken")

    def _is_left_over(self, run: RunRecord, source: CheckpointRecord) -> bool:
        was_never_used = run.unloaded and run.last_request_at == run.created_at
        is_fit = (run.base_model, run.spec) == (source.base_model, source.spec)
        return was_never_used and is_fit and not self._books.checkpoints.of_run(run.run_id)

    def _make_holder(
        self, source: CheckpointRecord, tenant: str, session_id: str, number: int, now: float
    ) -> None:
        run_id, session = run_id_for(session_id, number), self._books.sessions.get(tenant, session_id)
        if self._books.runs.find(run_id) is None:
            run = RunRecord(run_id, session_id, number, tenant, source.base_model, source.spec, now, now)
            self._books.runs.create(replace(run, unloaded=True))
        session.models[number] = (run_id, None)

    def _archive(self, tenant: str, project_id: str | None, once: str) -> str:
        """A session of its own for a copy, the same if the request is sent again; over from the start."""
        token = hashlib.sha256("\n".join((tenant, project_id or "", once)).encode()).hexdigest()[:32]
        session_id = f"session-copy-{token}" if once else None
        sessions = self._books.sessions
        if session_id is not None and sessions.exists(session_id):
            return session_id
        info = {"project_id": project_id, "display_name": "copied weights"}
        session_id = sessions.create(tenant, info, self._books.clock.now(), session_id)
        sessions.finish(tenant, session_id, {"type": "success"})
        return session_id

    async def assign_project(self, tenant: str, session_id: str, project_id: str) -> None:
        self._books.sessions.describe(tenant, session_id, {"project_id": project_id})

    async def search_sessions(
        self, tenant: str, query: SessionQuery
    ) -> tuple[list[Mapping[str, Any]], Mapping[str, Any] | None]:
        if query.owners is not None and tenant not in query.owners:
            return [], None
        found: list[Mapping[str, Any]] = []
        sessions = self._books.sessions.of_tenant(tenant)
        for session in sorted(sessions, key=lambda session: place_of(session.record), reverse=True):
            if not matches(session.record, query):
                continue
            if len(found) == query.limit:
                last = found[-1]
                return found, {"last_created_at": last["created_at"], "last_session_id": last["session_id"]}
            runs = [run_id for run_id, _ in session.models.values()]
            records = [record for run_id in runs for record in self._books.checkpoints.of_run(run_id)]
            found.append(summary(session.record, records))
        return found, None

    async def list_runs(
        self, tenant: str, limit: int, offset: int, project_id: str | None = None
    ) -> tuple[list[Mapping[str, Any]], int]:
        runs = self._books.runs.of_tenant(tenant)
        if project_id is not None:
            sessions = self._books.sessions
            runs = [
                run for run in runs if project_of(sessions.info(tenant, run.record.session_id)) == project_id
            ]
        return [self._run_view(run) for run in runs[offset : offset + limit]], len(runs)

    async def bill(self, tenant: str, since: float, until: float) -> Mapping[str, Any]:
        return self._books.usage.bill(tenant, since, until)

    async def checkpoint_storage(self, tenant: str, project_id: str | None) -> Mapping[str, Any]:
        return self._books.usage.storage(tenant, project_id)

    async def audit(self, tenant: str, day: str | None, event_type: str) -> list[dict[str, Any]]:
        return self._books.usage.audit(tenant, day, event_type)


def _are_same(one: CheckpointRecord, other: CheckpointRecord) -> bool:
    """Whether one is the other or a copy of it: manifests say which run saved what."""
    try:
        return one == other or read_manifest(one.directory) == read_manifest(other.directory)
    except CheckpointError:
        return False
