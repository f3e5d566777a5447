"""What comes in for runs: their creation, and the commands that go into their logs.

Knows sessions, logs, gaps in seq_ids and where a run is placed. Does not know ticks: a driver is told that a
run has work. Polling is polling.py's.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from twinkle_serve.config import LimitsConfig
from twinkle_serve.control.acceptance import Acceptance
from twinkle_serve.control.backend import Command, Invalid, PassCommand, UnloadCommand
from twinkle_serve.control.books import Books
from twinkle_serve.control.clock import Clock, Timer
from twinkle_serve.control.commands import BirthCommand
from twinkle_serve.control.groups import Drivers, homes_of, place_run
from twinkle_serve.control.keeper import Keeper
from twinkle_serve.control.orders import check_loadable
from twinkle_serve.control.room import check_disk
from twinkle_serve.control.runs import Run, run_id_for
from twinkle_serve.control.sessions import Session
from twinkle_serve.control.views import text_values
from twinkle_serve.protocol.data import LoraSpec
from twinkle_serve.protocol.errors import BackendUnavailable, UserError
from twinkle_serve.storage.records import RunRecord


class Training:
    """See control.backend.Backend for what the methods of these names promise."""

    def __init__(
        self,
        books: Books,
        drivers: Drivers,
        accept: Acceptance,
        keeper: Keeper | None,
        limits: LimitsConfig,
        clock: Clock,
    ) -> None:
        self._books = books
        self._drivers = drivers
        self._accept = accept
        self._keeper = keeper
        self._limits = limits
        self._clock = clock
        self._gap_timers: dict[str, Timer] = {}

    def close(self) -> None:
        """Nothing is given up any more."""
        for timer in self._gap_timers.values():
            timer.cancel()

    async def create_model(
        self,
        tenant: str,
        session_id: str,
        model_seq_id: int,
        base_model: str,
        spec: LoraSpec,
        user_metadata: Mapping[str, Any],
    ) -> str:
        max_rank = homes_of(self._drivers, base_model)[0].group.info.max_rank
        if not 1 <= spec.rank <= max_rank:
            raise Invalid(f"lora_config.rank {spec.rank} is not between 1 and {max_rank}")
        birth = BirthCommand()
        return await self._create_run(
            tenant, session_id, model_seq_id, base_model, spec, user_metadata, birth
        )

    async def create_model_from(
        self,
        tenant: str,
        session_id: str,
        model_seq_id: int,
        path: str,
        optimizer: bool,
        base_model: str | None,
        user_metadata: Mapping[str, Any],
    ) -> str:
        self._books.sessions.get(tenant, session_id)
        source = self._books.checkpoints.find(tenant, path)
        model = source.base_model if base_model is None else base_model
        max_rank = homes_of(self._drivers, model)[0].group.info.max_rank
        try:
            check_loadable(source, model, optimizer)
        except UserError as error:
            raise Invalid(str(error)) from None
        if source.spec.rank > max_rank:
            raise Invalid(
                f"path {path!r} has rank {source.spec.rank}; {model} is served up to rank {max_rank}"
            )
        birth = BirthCommand(path, optimizer)
        return await self._create_run(
            tenant, session_id, model_seq_id, model, source.spec, user_metadata, birth
        )

    async def _create_run(
        self,
        tenant: str,
        session_id: str,
        model_seq_id: int,
        base_model: str,
        spec: LoraSpec,
        user_metadata: Mapping[str, Any],
        birth: BirthCommand,
    ) -> str:
        now = self._clock.now()
        session = self._books.sessions.usable(tenant, session_id, now)
        run_id = run_id_for(session_id, model_seq_id)
        if model_seq_id in session.models:
            _, original = session.models[model_seq_id]
            if original is not None:
                return await self._accept.durable(original)
            run = self._books.runs.get(tenant, run_id)
            if not self._was_never_accepted(run):
                return self._accept.failed(tenant, run.down)
            run.log = run.log.restarted(1)
            return await self._bear(session, run, birth)
        self._accept.check_room(tenant)
        self._books.quotas.check_room(tenant)
        if self._keeper is not None:
            check_disk(self._keeper)
        record = RunRecord(
            run_id, session_id, model_seq_id, tenant, base_model, spec, now, now, text_values(user_metadata)
        )
        return await self._bear(session, self._books.runs.create(record), birth)

    async def _bear(self, session: Session, run: Run, birth: BirthCommand) -> str:
        request_id = self._accept.open(run.tenant, ("run", run.run_id, 0))
        session.models[run.record.model_seq_id] = (run.run_id, request_id)
        run.log.prepend(request_id, birth)
        place_run(self._books, self._drivers, run)
        if self._keeper is not None:
            self._keeper.accept(run, 0, request_id, birth, numbered=True)
        self._drivers[run.group].ready(run)
        return await self._accept.durable(request_id)

    def _was_never_accepted(self, run: Run) -> bool:
        """Its record was written, and then this server died before its client was told."""
        if self._keeper is None or run.run_id in self._keeper.kept or run.record.unloaded:
            return False
        return run.record.last_request_at == run.record.created_at

    async def submit(self, tenant: str, run_id: str, seq_id: int | None, command: Command) -> str:
        now = self._clock.now()
        original = self._books.runs.get(tenant, run_id).log.original(seq_id)
        if original is not None:
            return await self._accept.durable(original)
        run = self._books.runs.usable(tenant, run_id, now)
        if run.record.corrupted:
            return self._accept.failed(tenant, run.down)  # its log may lack what others wait for
        if run.home is None:  # of an earlier life, and the journal has nothing of it
            place_run(self._books, self._drivers, run)
        num_bytes = len(command.datums) if isinstance(command, PassCommand) else 0
        if not isinstance(command, UnloadCommand):  # which makes room
            self._accept.check_room(tenant)
        if seq_id is None or seq_id != run.log.missing:  # what others wait for makes room
            self._books.quotas.check_room(tenant, num_bytes)
        self._check_parked(run, seq_id)
        request_id = self._accept.open(tenant, ("run", run_id, seq_id), num_bytes=num_bytes)
        if self._keeper is not None:
            number = run.log.next_number if seq_id is None else seq_id
            self._keeper.accept(run, number, request_id, command, numbered=seq_id is not None)
        failure = run.log.append(seq_id, request_id, command, now)
        if failure is not None:
            self._books.fail(request_id, failure)
        self._drivers[run.group].ready(run)
        self.watch_gap(run)
        return await self._accept.durable(request_id)

    def _check_parked(self, run: Run, seq_id: int | None) -> None:
        """A client may send far ahead of a request that does not come, but not without end. And a request
        without a seq_id takes the next one, which may be on its way too."""
        missing = run.log.missing
        if missing is not None and seq_id is None:
            raise BackendUnavailable(f"seq_id {missing} has not arrived, and this is to come after it")
        if missing is None or seq_id is None or seq_id <= missing:
            return
        parked = sum(len(c.datums) for c in run.log.parked if isinstance(c, PassCommand))
        if parked > self._limits.parked_bytes_per_run:
            raise BackendUnavailable(f"too much waits for seq_id {missing}, which has not arrived")

    def watch_gap(self, run: Run) -> None:
        """See to it that a hole in the run's seq_ids is given up in time."""
        deadline = run.log.deadline
        if deadline is not None and run.run_id not in self._gap_timers:
            delay = max(0.0, deadline - self._clock.now())
            self._gap_timers[run.run_id] = self._clock.call_later(delay, partial(self._gap_due, run))

    def _gap_due(self, run: Run) -> None:
        del self._gap_timers[run.run_id]
        last = run.log.next_number - 1
        failed = run.log.expire(self._clock.now())
        if failed and self._keeper is not None:
            self._keeper.gave_up(run, last)
        for request_id, failure in failed:
            self._books.fail(request_id, failure)
        self.watch_gap(run)
