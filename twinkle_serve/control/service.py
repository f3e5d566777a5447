"""The control plane: the Backend that the gateway talks to, over one tick loop a base model.

Knows which registry answers what and which group a run belongs to. Does not know transports, and never
waits for a tick: commands go into logs, and answers are polled for. What is only looked up or changed on
record is on_record.py's.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from twinkle_serve.config import Config, ModelConfig
from twinkle_serve.control import recovery
from twinkle_serve.control.backend import Command, Ended, Invalid, PassCommand, Poll, RunInfo
from twinkle_serve.control.books import open_books
from twinkle_serve.control.clock import Clock, SystemClock, Timer
from twinkle_serve.control.commands import BirthCommand, RunEntry
from twinkle_serve.control.custom_losses import loss_id_for
from twinkle_serve.control.driver import GroupDriver, Recover, fail_in_flight
from twinkle_serve.control.durability import Durability
from twinkle_serve.control.group import Group, GroupLost
from twinkle_serve.control.groups import groups_of, place_run, place_sample, sampling_group_names
from twinkle_serve.control.insight import cluster_view, gap_in_words, in_words, measure, run_insight
from twinkle_serve.control.keeper import Keeper
from twinkle_serve.control.management import Management
from twinkle_serve.control.metrics import Meter
from twinkle_serve.control.orders import check_loadable
from twinkle_serve.control.promises import random_token
from twinkle_serve.control.quotas import Reason, own_name
from twinkle_serve.control.runs import Run, run_id_for
from twinkle_serve.control.samplers import sampler_id_for
from twinkle_serve.control.sampling import Sampling
from twinkle_serve.control.sessions import Session
from twinkle_serve.control.views import text_values
from twinkle_serve.control.watch import Watch
from twinkle_serve.protocol.data import LoraSpec, SampleRequest
from twinkle_serve.protocol.errors import CAPACITY, BackendUnavailable, Busy, UserError
from twinkle_serve.protocol.work import Failure, ModelInfo
from twinkle_serve.storage.records import LossRecord, RunRecord, SamplerRecord

if TYPE_CHECKING:
    from twinkle_serve.storage.catalog import Catalog
    from twinkle_serve.storage.ledger import Ledger

_SWEEP_EVERY_S = 5.0
_LISTING_S = 2.0
_RECOVERING = "the service is recovering from a failure; nothing that was accepted is lost"
_FULL = "this server's room for adapters is full; a new run starts once another one ends"
_RESULTS = "this server's room for results is full; it empties as they are fetched or grow old"
_STOPPING = Failure("the server is shutting down", "server")


class ControlPlane(Management):
    """See control.backend.Backend for what each method promises. ``start`` before, ``close`` after."""

    def __init__(
        self,
        groups: Mapping[str, Group],
        catalog: Catalog,
        config: Config,
        clock: Clock | None = None,
        *,
        recover: Recover = fail_in_flight,
        new_token: Callable[[], str] = random_token,
        durability: Durability | None = None,
        meter: Meter | None = None,
        name_of: Callable[[str], str] = own_name,
        ledger: Ledger | None = None,
    ) -> None:
        """groups: by the names that ``group_names`` gives, each loaded. recover: what to do about requests
        and runs of a group that died. new_token: where unguessable ids come from. durability: with it nothing
        accepted is lost, and ``recover`` is not asked. meter: where numbers for operators go. name_of: see
        Quotas. ledger: where usage is kept."""
        self._limits = config.limits
        gap_timeout_s = min(model.planner.gap_timeout_s for model in config.models)
        self._clock = clock or SystemClock()
        super().__init__(
            open_books(catalog, self._clock, config.limits, gap_timeout_s, new_token, meter, name_of, ledger)
        )
        self._keeper: Keeper | None = None
        if durability is not None:
            retention_s = config.limits.result_retention_s
            self._keeper = Keeper(self._books, durability, config.storage, retention_s, new_token)
            self._keeper.parked = lambda run: self._drivers[run.group].park(run)
            self._keeper.unreadable = self._fall_back
            recover = self._replay
        self._recover = recover
        self._drivers: dict[str, GroupDriver] = {}
        models = {model.name: model for model in config.models}
        for name, group in groups.items():
            self._drivers[name] = self._make_driver(name, group, models[group.info.name])
        self._sampling = Sampling(
            self._books,
            config.limits,
            self._sampling_driver,
            lambda tenant, origin, num_bytes: self._open(tenant, origin, True, num_bytes),
            None if self._keeper is None else self._keeper.path_of_sampler,
        )
        self._gap_timers: dict[str, Timer] = {}
        self._making: dict[str, asyncio.Future[str]] = {}
        self._sweep_timer: Timer | None = None
        self._closing = False

    @property
    def watch(self) -> Watch:
        return self._books.watch

    def _make_driver(self, name: str, group: Group, config: ModelConfig) -> GroupDriver:
        weight = self._books.quotas.weight
        only = name in sampling_group_names(config)
        return GroupDriver(group, self._books, config, weight, self._recover, self._keeper, name, only)

    async def start(self) -> None:
        if self._keeper is not None:
            self._take_up(recovery.restore(self._keeper))
        for driver in self._drivers.values():
            driver.start()
        self._sweep()

    def add_group(self, name: str, group: Group, config: ModelConfig) -> None:
        """Serve with one group more, loaded, of a new base model or of one that is served already."""
        assert name not in self._drivers
        self._drivers[name] = self._make_driver(name, group, config)
        self._drivers[name].start()

    def _take_up(self, runs: Sequence[Run]) -> None:
        """Find a group for each run of an earlier life of this server, and let it do what is left to do."""
        assert self._keeper is not None
        served = {driver.group.info.name for driver in self._drivers.values()}
        for run in runs:
            if run.record.base_model in served:
                place_run(self._books, self._drivers, run)
                self._watch_gap(run)
                if recovery.has_work(run):
                    self._drivers[run.group].ready(run)
        for sampler in self._books.samplers.with_snapshot():
            owner = self._books.runs.find(sampler.record.run_id or "")
            sampler.home = None if owner is None else owner.home
        for name in self._drivers:
            recovery.relocate_snapshots(self._keeper, name)

    async def close(self, timeout_s: float = 10.0) -> None:
        """Let running ticks end within ``timeout_s``; then everything still pending fails, unless it is in
        the journal, where the next start finds it."""
        self._closing = True
        await asyncio.gather(*(driver.close(timeout_s) for driver in self._drivers.values()))
        self._books.usage.write()
        for timer in [*self._gap_timers.values(), *filter(None, [self._sweep_timer])]:
            timer.cancel()
        if self._keeper is not None:
            await self._keeper.close(min(timeout_s, _LISTING_S))
            self._books.promises.wake_all()
        else:
            self._books.promises.fail_all(_STOPPING, self._clock.now())

    async def _replay(self, driver: GroupDriver, lost: GroupLost) -> None:
        assert self._keeper is not None
        driver.lose()
        recovery.suspend_snapshots(self._keeper, driver.name)
        runs = self._books.runs.of_group(driver.name)
        for run in runs:
            await recovery.rewind(self._keeper, run)
        recovery.relocate_snapshots(self._keeper, driver.name)
        for run in runs:
            if recovery.has_work(run):
                driver.ready(run)

    async def _fall_back(self, run: Run, held: list[RunEntry], reason: str) -> None:
        assert self._keeper is not None
        await recovery.fall_back(self._keeper, run, held, reason)
        self._drivers[run.group].ready(run)

    async def healthy(self) -> bool:
        """Whether every base model has a group that is up."""
        up = {driver.group.info.name for driver in self._drivers.values() if driver.healthy}
        return not self._closing and all(info.name in up for info in await self.models())

    async def models(self) -> Sequence[ModelInfo]:
        return list({driver.group.info.name: driver.group.info for driver in self._drivers.values()}.values())

    # sessions -------------------------------------------------------------------------------------

    async def create_session(self, tenant: str, info: Mapping[str, Any]) -> str:
        return self._books.sessions.create(tenant, info, self._clock.now())

    async def heartbeat(self, tenant: str, session_id: str) -> bool:
        return self._books.sessions.heartbeat(tenant, session_id, self._clock.now())

    async def finish_session(self, tenant: str, session_id: str, reason: Mapping[str, Any]) -> None:
        if not self._books.sessions.finish(tenant, session_id, reason):
            return
        self._sampling.end_session(session_id)
        self._books.losses.end_session(session_id)
        for run_id, _ in self._books.sessions.get(tenant, session_id).models.values():
            self._books.samplers.retire(run_id, keep=0)
            self._park(run_id)
        for driver in self._drivers.values():
            driver.wake()

    # training -------------------------------------------------------------------------------------

    async def create_model(
        self,
        tenant: str,
        session_id: str,
        model_seq_id: int,
        base_model: str,
        spec: LoraSpec,
        user_metadata: Mapping[str, Any],
    ) -> str:
        max_rank = self._driver(base_model).group.info.max_rank
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
        self._driver(model)
        try:
            check_loadable(source, model, optimizer)
        except UserError as error:
            raise Invalid(str(error)) from None
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
                return await self._durable(original)
            run = self._books.runs.get(tenant, run_id)
            if not self._was_never_accepted(run):
                return self._failed(tenant, run.down)
            run.log = run.log.restarted(1)
            return await self._bear(session, run, birth)
        self._check_room()
        self._books.quotas.check_room(tenant)
        record = RunRecord(
            run_id, session_id, model_seq_id, tenant, base_model, spec, now, now, text_values(user_metadata)
        )
        return await self._bear(session, self._books.runs.create(record), birth)

    async def _bear(self, session: Session, run: Run, birth: BirthCommand) -> str:
        request_id = self._open(run.tenant, ("run", run.run_id, 0))
        session.models[run.record.model_seq_id] = (run.run_id, request_id)
        run.log.prepend(request_id, birth)
        place_run(self._books, self._drivers, run)
        if self._keeper is not None:
            self._keeper.accept(run, 0, request_id, birth, numbered=True)
        self._drivers[run.group].ready(run)
        return await self._durable(request_id)

    def _was_never_accepted(self, run: Run) -> bool:
        """Its record was written, and then this server died before its client was told."""
        if self._keeper is None or run.run_id in self._keeper.kept or run.record.unloaded:
            return False
        return run.record.last_request_at == run.record.created_at

    async def submit(self, tenant: str, run_id: str, seq_id: int | None, command: Command) -> str:
        now = self._clock.now()
        original = self._books.runs.get(tenant, run_id).log.original(seq_id)
        if original is not None:
            return await self._durable(original)
        run = self._books.runs.usable(tenant, run_id, now)
        if run.record.corrupted:
            return self._failed(tenant, run.down)  # its log may lack what others wait for
        driver = self._driver_of(run)
        num_bytes = len(command.datums) if isinstance(command, PassCommand) else 0
        self._check_room()
        if seq_id is None or seq_id != run.log.missing:  # what others wait for makes room
            self._books.quotas.check_room(tenant, num_bytes)
        self._check_parked(run, seq_id)
        request_id = self._open(tenant, ("run", run_id, seq_id), num_bytes=num_bytes)
        if self._keeper is not None:
            number = run.log.next_number if seq_id is None else seq_id
            self._keeper.accept(run, number, request_id, command, numbered=seq_id is not None)
        failure = run.log.append(seq_id, request_id, command, now)
        if failure is not None:
            self._books.fail(request_id, failure)
        driver.ready(run)
        self._watch_gap(run)
        return await self._durable(request_id)

    async def _durable(self, request_id: str) -> str:
        """The id, once the request is on disk."""
        if self._keeper is not None:
            await self._keeper.durable(request_id)
        return request_id

    def _check_parked(self, run: Run, seq_id: int | None) -> None:
        """A client may send far ahead of a request that does not come, but not without end."""
        missing = run.log.missing
        if missing is None or seq_id is None or seq_id <= missing:
            return
        parked = sum(len(c.datums) for c in run.log.parked if isinstance(c, PassCommand))
        if parked > self._limits.parked_bytes_per_run:
            raise BackendUnavailable(f"too much waits for seq_id {missing}, which has not arrived")

    def _check_room(self) -> None:
        if self._keeper is not None:
            self._keeper.check_room()

    def _watch_gap(self, run: Run) -> None:
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
        self._watch_gap(run)

    async def run_insight(self, tenant: str, run_id: str) -> Mapping[str, Any]:
        run = self._books.runs.get(tenant, run_id)
        return run_insight(self._books, self._driver_of(run), run)

    async def cluster_view(self) -> Mapping[str, Any]:
        return cluster_view(self._books, self._drivers, self._keeper)

    async def run_info(self, tenant: str, run_id: str) -> RunInfo:
        record = self._books.runs.get(tenant, run_id).record
        return RunInfo(run_id, tenant, self._driver(record.base_model).group.info, record.spec)

    async def create_custom_loss(
        self, tenant: str, session_id: str, custom_loss_seq_id: int, graph: str | Failure
    ) -> str:
        session = self._books.sessions.usable(tenant, session_id, self._clock.now())
        loss_id = loss_id_for(session.record.session_id, custom_loss_seq_id)
        making = self._making.get(loss_id)
        if making is None:
            making = asyncio.ensure_future(self._make_loss(tenant, session_id, loss_id, graph))
            self._making[loss_id] = making
            making.add_done_callback(lambda _: self._making.pop(loss_id))
        return await asyncio.shield(making)

    async def _make_loss(self, tenant: str, session_id: str, loss_id: str, graph: str | Failure) -> str:
        known = self._books.losses.find(loss_id)
        if known is not None:
            return known.request_id
        if isinstance(graph, Failure):
            return self._failed(tenant, graph)
        try:
            failure = await next(iter(self._drivers.values())).group.check_loss(graph)
        except GroupLost:
            raise BackendUnavailable(_RECOVERING) from None
        if failure is not None:
            return self._failed(tenant, failure)
        now = self._clock.now()
        request_id = self._books.promises.open(tenant, None)
        self._books.losses.add(LossRecord(loss_id, session_id, tenant, now, request_id, graph))
        self._books.resolve(request_id, {"loss_id": loss_id})
        return request_id

    # sampling -------------------------------------------------------------------------------------

    async def create_sampler(
        self,
        tenant: str,
        session_id: str,
        sampling_session_seq_id: int,
        base_model: str | None,
        model_path: str | None,
    ) -> str:
        now = self._clock.now()
        session = self._books.sessions.usable(tenant, session_id, now)
        if sampling_session_seq_id in session.samplers:
            return session.samplers[sampling_session_seq_id]
        if model_path is not None:
            source = self._books.checkpoints.find(tenant, model_path)
            if base_model not in (None, source.base_model):
                raise Invalid(f"model_path {model_path!r} belongs to {source.base_model}, not {base_model}")
            base_model = source.base_model
        if base_model is None:
            raise Invalid("one of base_model and model_path is needed")
        self._driver(base_model)
        sampler_id = sampler_id_for(session_id, sampling_session_seq_id)
        if self._books.samplers.exists(sampler_id):
            raise Invalid(f"sampling_session_seq_id {sampling_session_seq_id} belongs to a snapshot")
        record = SamplerRecord(sampler_id, session_id, tenant, base_model, now, model_path)
        self._books.samplers.create(record)
        session.samplers[sampling_session_seq_id] = sampler_id
        return sampler_id

    async def sampler_info(self, tenant: str, sampler_id: str) -> Mapping[str, Any]:
        record = self._books.samplers.get(tenant, sampler_id).record
        return {
            "sampler_id": sampler_id,
            "base_model": record.base_model,
            "model_path": record.model_path,
            "model": self._driver(record.base_model).group.info,
        }

    async def sample(
        self, tenant: str, sampler_id: str, seq_id: int | None, request: SampleRequest | Failure
    ) -> tuple[str, list[str]]:
        return self._sampling.submit(tenant, sampler_id, seq_id, request)

    async def sample_model(
        self,
        tenant: str,
        base_model: str | None,
        model_path: str | None,
        request: SampleRequest,
        stream: bool,
    ) -> str:
        return self._sampling.submit_to_model(tenant, base_model, model_path, request, stream)

    async def cancel(self, tenant: str, request_id: str) -> None:
        if self._books.promises.look(tenant, request_id).state == "pending":
            self._sampling.cancel(tenant, request_id)

    # promises -------------------------------------------------------------------------------------

    async def poll(self, tenant: str, request_id: str, timeout_s: float) -> Poll:
        promises = self._books.promises
        poll = self._look(tenant, request_id)
        if poll.state != "pending":
            return poll
        if timeout_s <= 0:
            with self._sampling.asked_for(request_id):
                return poll
        woken = asyncio.Event()
        unsubscribe = promises.subscribe(request_id, woken.set)
        timer = self._clock.call_later(timeout_s, woken.set)
        try:
            with self._sampling.asked_for(request_id):
                await woken.wait()
        finally:
            timer.cancel()
            unsubscribe()
        return self._look(tenant, request_id)

    def _look(self, tenant: str, request_id: str) -> Poll:
        poll = self._books.promises.look(tenant, request_id)
        if poll.state != "pending":
            return poll
        origin = self._books.promises.origin(request_id)
        drivers = self._drivers_of(origin)
        if any(driver.lost is not None for driver in drivers):
            return replace(poll, queue_state="paused_capacity", queue_reason=_RECOVERING)
        limit = self._over_limit(tenant, request_id, origin)
        if limit is not None:
            return replace(poll, queue_state=limit[0], queue_reason=limit[1])
        is_birth = isinstance(origin, tuple) and origin[0] == "run" and origin[2] == 0
        if is_birth and any(driver.is_full() for driver in drivers):
            return replace(poll, queue_state="paused_capacity", queue_reason=_FULL)
        reason = self._standing(tenant, request_id)
        return poll if reason is None else replace(poll, queue_state="paused_capacity", queue_reason=reason)

    def _standing(self, tenant: str, request_id: str) -> str | None:
        """Where a request stands that waits for others, in words; None if it is being worked on."""
        run_id = self._books.promises.run_of(request_id)
        run = None if run_id is None else self._books.runs.find(run_id)
        if run is not None:
            if self._books.watch.is_running(request_id):
                return None
            standings = [self._drivers[run.group].run_standing(run)]
            gap = gap_in_words(run, self._books.watch.seq_id_of(request_id))
            if gap is not None:
                return gap
        else:
            standings = [driver.sample_standing(tenant, request_id) for driver in self._drivers.values()]
        return next((in_words(*standing) for standing in standings if standing is not None), None)

    def _over_limit(self, tenant: str, request_id: str, origin: Any) -> Reason | None:
        """What the tenant uses so much of that the request, or one before it in its run, has to wait."""
        if not isinstance(origin, tuple):
            return None
        if origin[0] != "run":
            found = (driver.too_fast(tenant, request_id) for driver in self._drivers.values())
            return next(filter(None, found), None)
        run = self._books.runs.find(origin[1])
        if run is None or not run.log.ready:
            return None
        return self._books.quotas.reason_to_wait(run, run.log.ready[0].command)

    def gauges(self) -> Mapping[str, Mapping[str, float]]:
        """By name: what each group holds. Names as in GroupDriver.gauges and TickReport.gauges."""
        return {name: driver.gauges() for name, driver in self._drivers.items()}

    def measure(self) -> None:
        """Set every gauge of the control plane to what it is now."""
        measure(self._books, self._drivers, self._keeper)

    async def poll_samples(
        self, tenant: str, sampler_id: str, clone: int, cursor: int, timeout_s: float
    ) -> tuple[tuple[Ended, ...], int] | None:
        return await self._sampling.poll_all(tenant, sampler_id, clone, cursor, timeout_s)

    async def follow(self, tenant: str, request_id: str, after: int, timeout_s: float) -> Poll:
        promises = self._books.promises
        if promises.progress(tenant, request_id, after):
            timeout_s = 0.0
        poll = await self.poll(tenant, request_id, timeout_s)
        if poll.state != "pending":
            return poll
        return Poll("pending", promises.progress(tenant, request_id, after), None, poll.queue_state)

    # helpers --------------------------------------------------------------------------------------

    def _driver(self, base_model: str) -> GroupDriver:
        """Any group of the base model. Raises NotFound."""
        return groups_of(self._drivers, base_model)[0]

    def _driver_of(self, run: Run) -> GroupDriver:
        """Raises NotFound if the run's base model is not served any more."""
        return self._drivers.get(run.group) or self._driver(run.record.base_model)

    def _drivers_of(self, origin: Any) -> list[GroupDriver]:
        """The groups that may be at work on a request."""
        run = self._books.runs.find(origin[1]) if isinstance(origin, tuple) and origin[0] == "run" else None
        return list(self._drivers.values()) if run is None else [self._driver_of(run)]

    def _sampling_driver(self, base_model: str, home: str | None) -> GroupDriver:
        return self._drivers.get(home or "") or place_sample(self._drivers, base_model)

    def _open(
        self, tenant: str, origin: tuple[str, str, int | None], sampling: bool = False, num_bytes: int = 0
    ) -> str:
        if self._closing:
            raise BackendUnavailable(_STOPPING.message)
        if self._books.promises.is_full:
            raise Busy(_RESULTS, CAPACITY)
        if sampling:
            self._books.quotas.check_room(tenant, num_bytes)
        request_id = self._books.promises.open(tenant, origin, sampling, num_bytes)
        self._books.watch.accepted(request_id, tenant, origin)
        return request_id

    def _failed(self, tenant: str, failure: Failure | None) -> str:
        """A promise that has failed already."""
        request_id = self._books.promises.open(tenant, None)
        self._books.fail(request_id, failure or Failure("this model_seq_id is taken by an older run"))
        return request_id

    def _park(self, run_id: str) -> None:
        run = self._books.runs.find(run_id)
        if self._keeper is not None and run is not None and not run.record.unloaded:
            self._keeper.park(run)
            self._drivers[run.group].wake()

    def _sweep(self) -> None:
        for session_id in self._books.sweep():
            self._sampling.end_session(session_id)
            for run_id in self._books.sessions.runs_of(session_id):
                self._park(run_id)
        self._sampling.sweep()
        for driver in self._drivers.values():
            if driver.planner.has_work:
                driver.wake()  # what waits for room may have got some
        if self._keeper is not None:
            self._keeper.sweep()
            for driver in self._drivers.values():
                if self._keeper.due(driver.name):
                    driver.wake()
        self._sweep_timer = self._clock.call_later(_SWEEP_EVERY_S, self._sweep)
