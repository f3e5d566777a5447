"""The control plane: the Backend that the gateway talks to, over one tick loop a base model.

Knows which registry answers what and which group a run belongs to. Does not know transports, and never
waits for a tick: commands go into logs, and answers are polled for. What is only looked up or changed on
record is on_record.py's.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from twinkle_serve.config import Config, ModelConfig
from twinkle_serve.control import recovery
from twinkle_serve.control.acceptance import STOPPING, Acceptance
from twinkle_serve.control.backend import Command, Ended, Invalid, Poll, RunInfo
from twinkle_serve.control.books import open_books
from twinkle_serve.control.clock import Clock, SystemClock, Timer
from twinkle_serve.control.commands import RunEntry
from twinkle_serve.control.driver import GroupDriver, Recover, fail_in_flight
from twinkle_serve.control.durability import Durability
from twinkle_serve.control.ending import Ending
from twinkle_serve.control.group import Group, GroupLost
from twinkle_serve.control.groups import (
    Drivers,
    driver_of,
    groups_of,
    place_run,
    place_sample,
    sampling_group_names,
)
from twinkle_serve.control.insight import cluster_view, measure, run_insight
from twinkle_serve.control.keeper import Keeper
from twinkle_serve.control.loss_making import LossMaking
from twinkle_serve.control.management import Management
from twinkle_serve.control.metrics import Meter
from twinkle_serve.control.polling import Polling
from twinkle_serve.control.promises import random_token
from twinkle_serve.control.quotas import own_name
from twinkle_serve.control.runs import Run
from twinkle_serve.control.samplers import sampler_id_for
from twinkle_serve.control.sampling import Sampling
from twinkle_serve.control.training import Training
from twinkle_serve.control.watch import Watch
from twinkle_serve.model_config import PlannerConfig
from twinkle_serve.protocol.data import LoraSpec, SampleRequest
from twinkle_serve.protocol.work import Failure, ModelInfo
from twinkle_serve.storage.records import SamplerRecord

if TYPE_CHECKING:
    from twinkle_serve.storage.catalog import Catalog
    from twinkle_serve.storage.ledger import Ledger

logger = logging.getLogger(__name__)

_SWEEP_EVERY_S = 5.0
_LISTING_S = 2.0


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
        self._planners = {model.name: model.planner for model in config.models}
        self._clock = clock or SystemClock()
        super().__init__(
            open_books(
                catalog, self._clock, config.limits, self._gap_timeout_s, new_token, meter, name_of, ledger
            )
        )
        self._keeper: Keeper | None = None
        if durability is not None:
            retention_s = config.limits.result_retention_s
            self._keeper = Keeper(self._books, durability, config.storage, retention_s, new_token)
            self._keeper.parked = lambda run: self._drivers[run.group].park(run)
            self._keeper.unreadable = self._fall_back
            self.no_room_for_a_copy = self._keeper.no_room_for_a_save
            recover = self._replay
        self._recover = recover
        self._accept = Acceptance(self._books, self._keeper)
        models = {model.name: model for model in config.models}
        self._drivers = Drivers(expected=models)
        for name, group in groups.items():
            self._drivers[name] = self._make_driver(name, group, models[group.info.name])
        self._sampling = Sampling(
            self._books,
            config.limits,
            self._sampling_driver,
            lambda tenant, origin, num_bytes: self._accept.open(tenant, origin, True, num_bytes),
            None if self._keeper is None else self._keeper.path_of_sampler,
        )
        self._training = Training(
            self._books, self._drivers, self._accept, self._keeper, config.limits, self._clock
        )
        self._ending = Ending(self._books, self._drivers, self._keeper, config.limits.run_retention_s)
        self._loss_making = LossMaking(self._books, self._drivers, self._accept, self._clock)
        self._polling = Polling(self._books, self._drivers, self._sampling, self._clock, self._keeper)
        self._sweep_timer: Timer | None = None
        self._waiting: list[Run] = []  # of an earlier life, with base models that nobody serves yet

    @property
    def watch(self) -> Watch:
        return self._books.watch

    def _make_driver(self, name: str, group: Group, config: ModelConfig) -> GroupDriver:
        weight = self._books.quotas.weight
        only = name in sampling_group_names(config)
        return GroupDriver(group, self._books, config, weight, self._recover, self._keeper, name, only)

    async def start(self) -> None:
        if self._keeper is not None:
            self._take_up(recovery.restore(self._keeper), self._trained())
        for driver in self._drivers.values():
            driver.start()
        self._take_steps()

    def add_group(self, name: str, group: Group, config: ModelConfig) -> None:
        """Serve with one group more, loaded, of a new base model or of one that is served already."""
        assert name not in self._drivers
        trained = self._trained()
        self._planners[config.name] = config.planner
        self._drivers[name] = self._make_driver(name, group, config)
        if self._keeper is not None and group.info.name in self._trained() - trained:
            self._take_up(self._waiting, {group.info.name})
        self._drivers[name].start()

    def expect(self, base_models: Iterable[str]) -> None:
        """These are deployed now; groups of those that are new follow once they are loaded."""
        self._drivers.expected = set(base_models)

    def _gap_timeout_s(self, base_model: str) -> float:
        return self._planners.get(base_model, PlannerConfig()).gap_timeout_s

    def _trained(self) -> set[str]:
        """The base models that have a group in which runs live."""
        return {driver.group.info.name for driver in self._drivers.values() if not driver.samples_only}

    def _take_up(self, runs: Sequence[Run], base_models: set[str]) -> None:
        """Find a group for each run of an earlier life of this server with one of ``base_models``, and let it
        do what is left to do. The others wait until their base model is served."""
        assert self._keeper is not None
        self._waiting = [run for run in runs if run.record.base_model not in base_models]
        for run in runs:
            if run.record.base_model in base_models:
                place_run(self._books, self._drivers, run)
                self._training.watch_gap(run)
                if recovery.has_work(run):
                    self._drivers[run.group].ready(run)
        for sampler in self._books.samplers.with_snapshot():
            if sampler.record.base_model in base_models:
                owner = self._books.runs.find(sampler.record.run_id or "")
                sampler.home = None if owner is None else owner.home
        for name, driver in self._drivers.items():
            if driver.group.info.name in base_models:
                recovery.relocate_snapshots(self._keeper, name)

    async def close(self, timeout_s: float = 10.0) -> None:
        """Let running ticks end within ``timeout_s``; then everything still pending fails, unless it is in
        the journal, where the next start finds it."""
        self._accept.closed = True
        await asyncio.gather(*(driver.close(timeout_s) for driver in self._drivers.values()))
        try:
            self._books.usage.write()
        except Exception:  # a full disk is no reason to leave what follows open
            logger.exception("what was used since the last sweeps is not in the ledger")
        self._training.close()
        if self._sweep_timer is not None:
            self._sweep_timer.cancel()
        if self._keeper is not None:
            await self._keeper.close(min(timeout_s, _LISTING_S))
            self._books.promises.wake_all()
        else:
            self._books.promises.fail_all(STOPPING, self._clock.now())

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
        self._training.watch_gap(run)  # one that opened while the run's log was held
        self._drivers[run.group].ready(run)

    async def healthy(self) -> bool:
        """Whether every base model has a group that is up."""
        up = {driver.group.info.name for driver in self._drivers.values() if driver.healthy}
        return not self._accept.closed and all(info.name in up for info in await self.models())

    async def models(self) -> Sequence[ModelInfo]:
        return list({driver.group.info.name: driver.group.info for driver in self._drivers.values()}.values())

    # sessions -------------------------------------------------------------------------------------

    async def create_session(self, tenant: str, info: Mapping[str, Any]) -> str:
        self._books.quotas.check_sessions(tenant)
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
        return await self._training.create_model(
            tenant, session_id, model_seq_id, base_model, spec, user_metadata
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
        return await self._training.create_model_from(
            tenant, session_id, model_seq_id, path, optimizer, base_model, user_metadata
        )

    async def submit(self, tenant: str, run_id: str, seq_id: int | None, command: Command) -> str:
        return await self._training.submit(tenant, run_id, seq_id, command)

    async def create_custom_loss(
        self, tenant: str, session_id: str, custom_loss_seq_id: int, graph: str | Failure
    ) -> str:
        return await self._loss_making.create_custom_loss(tenant, session_id, custom_loss_seq_id, graph)

    async def run_insight(self, tenant: str, run_id: str, curves: bool = True) -> Mapping[str, Any]:
        run = self._books.runs.get(tenant, run_id)
        return run_insight(self._books, driver_of(self._drivers, run), run, curves)

    async def cluster_view(self) -> Mapping[str, Any]:
        return cluster_view(self._books, self._drivers, self._keeper)

    async def run_info(self, tenant: str, run_id: str) -> RunInfo:
        record = self._books.runs.get(tenant, run_id).record
        return RunInfo(run_id, tenant, self._driver(record.base_model).group.info, record.spec)

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
        return await self._polling.poll(tenant, request_id, timeout_s)

    async def follow(self, tenant: str, request_id: str, after: int, timeout_s: float) -> Poll:
        return await self._polling.follow(tenant, request_id, after, timeout_s)

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

    # helpers --------------------------------------------------------------------------------------

    def _driver(self, base_model: str) -> GroupDriver:
        """Any group of the base model. Raises NotFound."""
        return groups_of(self._drivers, base_model)[0]

    def _sampling_driver(self, base_model: str, home: str | None) -> GroupDriver:
        return self._drivers.get(home or "") or place_sample(self._drivers, base_model)

    def _sweep(self) -> None:
        if self._keeper is None:
            self._take_steps()
        else:
            self._keeper.start(self._sweep_what_is_ours())

    async def _sweep_what_is_ours(self) -> None:
        """One that stood still and wakes up must not delete what another coordinator keeps by now."""
        assert self._keeper is not None
        await self._keeper.still_ours()
        if not self._accept.closed:
            self._take_steps()

    def _take_steps(self) -> None:
        """A step that fails, for want of room on the disk perhaps, is left to the next sweep; no other is."""
        own = (self._expire_sessions, self._ending.sweep, self._sampling.sweep, self._wake_waiting)
        try:
            for step in (*self._books.sweeps(), *own, self._sweep_journal):
                try:
                    step()
                except Exception:
                    logger.exception("a step of the sweep failed; the next sweep is in %g s", _SWEEP_EVERY_S)
        finally:
            self._sweep_timer = self._clock.call_later(_SWEEP_EVERY_S, self._sweep)

    def _expire_sessions(self) -> None:
        for session_id in self._books.sessions.expire(self._clock.now()):
            self._sampling.end_session(session_id)
            for run_id in self._books.sessions.runs_of(session_id):
                self._ending.park(run_id)

    def _wake_waiting(self) -> None:
        """What waits for room may have got some."""
        for driver in self._drivers.values():
            if driver.planner.has_work:
                driver.wake()

    def _sweep_journal(self) -> None:
        if self._keeper is not None:
            self._keeper.sweep()
            for driver in self._drivers.values():
                if self._keeper.due(driver.name):
                    driver.wake()
