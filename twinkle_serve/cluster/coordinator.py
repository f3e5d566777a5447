"""The coordinator actor: runs the control plane over the actor groups, and owns what they answer.

Knows how groups are started, and who is still interested in the service. Does not know HTTP, ordering or
tenants (control/). It lives as long as the model does: ingress replicas come and go, and a result that
a replica owned would go with it.
"""

from __future__ import annotations

import asyncio
import logging
import time
from dataclasses import dataclass, replace
from typing import Any

import ray

from twinkle_serve.cluster.deployment import Deployment
from twinkle_serve.cluster.fleet import Fleet
from twinkle_serve.cluster.group import ENGINE, LoadError, RayGroup
from twinkle_serve.cluster.metrics import RayMeter
from twinkle_serve.cluster.objects import resolve
from twinkle_serve.cluster.tracing import span_exporter
from twinkle_serve.config import ModelConfig
from twinkle_serve.control.backend import Backend, Invalid, NotFound
from twinkle_serve.control.durability import Durability
from twinkle_serve.control.service import ControlPlane
from twinkle_serve.control.spans import TRACE_PARENT
from twinkle_serve.logs import configure_logs
from twinkle_serve.protocol.errors import BackendUnavailable, Busy
from twinkle_serve.storage.catalog import Catalog
from twinkle_serve.storage.histories import HistoryFiles
from twinkle_serve.storage.journal import Journal
from twinkle_serve.storage.ledger import Ledger
from twinkle_serve.storage.states import StateFiles
from twinkle_serve.tenants import tenant_names

_log = logging.getLogger(__name__)
NAME = "coordinator"
NAMESPACE = "twinkle-serve"
METHODS = frozenset(name for name in vars(Backend) if not name.startswith("_"))
_GAUGES_EVERY_S = 5.0
_CURVES_EVERY_S = 30.0
_RELOAD_S = 30.0
# Each long poll of each client is one call that waits.
MAX_WAITING_CALLS = 100_000
_FAILED = "the service could not start; it is tried again, and its operator finds the reason in its log"


@dataclass(frozen=True, slots=True)
class Status:
    """state: "loading", "ready" or "failed"; message: what is going on, for people. deployed_at: see
    Deployment."""

    state: str
    message: str
    deployed_at: float = 0.0


@dataclass(frozen=True, slots=True)
class Refusal:
    """A call that was not answered: an error meant for the client, or None when not ready (see message)."""

    error: Exception | None
    message: str = ""


class Coordinator:
    """One per deployment. Every method is a coroutine in the actor's one event loop."""

    def __init__(self, deployment: Deployment, engine: str = ENGINE) -> None:
        config = deployment.config
        self._deployment = deployment
        self._config = config
        self._engine = engine
        self._fleet = Fleet(config, self._make_group)
        self._catalog: Catalog | None = None
        self._ledger: Ledger | None = None
        self._plane: ControlPlane | None = None
        self._served: set[str] = set()  # groups that the plane has
        self._joining: dict[str, asyncio.Task[None]] = {}  # by name of the group
        self._journal: Journal | None = None
        self._status = Status("loading", "starting")
        self._life: asyncio.Task[None] | None = None
        self._stopping: asyncio.Task[None] | None = None
        self._asked_at = time.monotonic()
        self._failed_at = 0.0
        self._curves = HistoryFiles(config.storage.root)
        self._curves_at = 0.0

    async def call(self, method: str, arguments: tuple[Any, ...], trace_parent: str | None = None) -> Any:
        """One Backend method. Returns its result, or a Refusal: an exception would reach the caller with
        a traceback for its message. trace_parent: of the HTTP request behind this."""
        assert method in METHODS, method
        TRACE_PARENT.set(trace_parent)
        self._live()
        if self._plane is None:
            return Refusal(None, self._public_message)
        try:
            return await getattr(self._plane, method)(*arguments)
        except (NotFound, Invalid, BackendUnavailable, Busy) as error:
            return Refusal(error)
        except Exception:
            _log.exception("%s failed", method)
            raise

    @property
    def _public_message(self) -> str:
        """What clients are told: why a start failed names directories, which only the operator should see."""
        has_failed = self._status.state == "failed" and self._stopping is None
        return _FAILED if has_failed else self._status.message

    async def ping(self) -> Status:
        """A replica is there. The first one starts everything."""
        self._live()
        return replace(self._status, deployed_at=self._deployment.deployed_at)

    async def adopt(self, deployment: Deployment) -> bool:
        """Serve what was deployed, if that can be done without losing what is loaded. A replica of an older
        deployment, which is about to end, is told yes."""
        if deployment.deployed_at < self._deployment.deployed_at:
            return True
        if not self._deployment.grows_to(deployment):
            return False
        self._deployment, self._config = deployment, deployment.config
        self._asked_at = time.monotonic()
        self._fleet.cover(deployment.config)
        if self._plane is not None:
            self._plane.expect(model.name for model in self._config.models)
        self._grow()
        return True

    async def stop(self) -> None:
        """End the ranks and close the catalogue. The actor is of no use afterwards. Two replicas that replace
        it may both ask, and each kills the actor once it is answered: so each waits for the whole of it."""
        if self._stopping is None:
            for task in (self._life, *self._joining.values()):
                if task is not None and task is not asyncio.current_task():
                    task.cancel()
            self._stopping = asyncio.create_task(self._stop())
        await self._stopping

    async def _stop(self) -> None:
        self._status = Status("failed", "the service is stopping")
        plane, self._plane = self._plane, None
        if plane is not None:
            await plane.close()
            await self._save_curves(plane)
        if self._journal is not None:
            await asyncio.to_thread(self._journal.close)
        if self._catalog is not None:
            self._catalog.close()
        if self._ledger is not None:
            self._ledger.close()
        await self._fleet.stop()

    def _live(self) -> None:
        """A replica is there. Start on the first call: an async actor has no running loop while it is
        constructed."""
        self._asked_at = time.monotonic()
        if self._life is None:
            self._life = asyncio.create_task(self._run())

    async def _run(self) -> None:
        await self._try_to_load()
        # After `serve shutdown` no replica pings any more, and the base model must not stay behind.
        while self._is_wanted():
            await asyncio.sleep(min(_GAUGES_EVERY_S, self._config.ray.orphan_exit_s / 20))
            try:
                await self._look_after()
            except Exception:  # no gauge is worth that nobody looks after groups and orphans any more
                _log.exception("looking after the service failed; it is tried again")
        _log.warning("nobody has asked for this service for %g s: it ends", self._config.ray.orphan_exit_s)
        try:
            await self.stop()
        finally:
            ray.kill(ray.get_runtime_context().current_actor, no_restart=True)

    async def _look_after(self) -> None:
        if self._plane is not None:
            self._grow()
            self._plane.measure()
            if time.monotonic() - self._curves_at > _CURVES_EVERY_S:
                await self._save_curves(self._plane)
        elif time.monotonic() - self._failed_at > _RELOAD_S:
            # After a crash the machine may be short of something for a while; clients are waiting.
            await self._try_to_load()

    def _is_wanted(self) -> bool:
        """A replica was heard lately, by what was deployed last: that also says how often they ping."""
        return time.monotonic() - self._asked_at < self._config.ray.orphan_exit_s

    async def _save_curves(self, plane: ControlPlane) -> None:
        """Of what came after the last time, recovery does most again."""
        self._curves_at = time.monotonic()
        await asyncio.to_thread(self._curves.save, plane.watch.histories.changed())

    async def _try_to_load(self) -> None:
        try:
            return await self._load()
        except LoadError as error:
            _log.error("the service could not start: %s", error)
            self._status = Status("failed", str(error))
        except Exception as error:
            _log.exception("the coordinator could not start")
            # Of a database only the first line says what is wrong, and none says which database it is.
            reason = str(error).partition("\n")[0]
            self._status = Status("failed", f"cannot start: {self._status.message}: {reason}")
        self._failed_at = time.monotonic()

    def _fenced(self) -> None:
        """Another coordinator has taken over; whatever this one does now is lost."""
        _log.error("another coordinator has opened the journal: this one ends")
        ray.kill(ray.get_runtime_context().current_actor, no_restart=True)

    async def _load(self) -> None:
        catalog, ledger = self._open_records()
        storage = self._config.storage
        names = ", ".join(self._fleet.missing)
        self._status = Status("loading", f"loading base model {names}")
        await self._fleet.start_enough()
        self._status = Status("loading", "taking up what is in the journal")
        # Opened only now, when this coordinator can go on with what the one before it left.
        journal = Journal(storage.root, storage.journal_url, storage.journal_sync)
        try:
            self._plane = await self._make_plane(journal, catalog, ledger)
        except BaseException:
            await asyncio.to_thread(journal.close)  # the next try opens another one
            raise
        self._journal = journal
        self._status = Status("ready", "ready")

    async def _make_plane(self, journal: Journal, catalog: Catalog, ledger: Ledger) -> ControlPlane:
        states = StateFiles(self._config.storage.root)
        durability = Durability(journal, states, resolve, self._fenced)
        groups = self._fleet.started
        plane = ControlPlane(
            groups,
            catalog,
            self._config,
            durability=durability,
            name_of=tenant_names(self._config),
            ledger=ledger,
            meter=RayMeter(),
        )
        plane.watch.spans.export = span_exporter(self._config.monitoring.otlp_endpoint, "coordinator")
        plane.watch.histories.load = self._curves.load
        await plane.start()
        self._served = set(groups)
        return plane

    def _open_records(self) -> tuple[Catalog, Ledger]:
        """Before the models, as nothing of this takes long, and each once. Not when this is made: an actor
        that raises then is made anew without end, and nobody is told why."""
        self._status = Status("loading", "opening the log, the catalogue and the ledger")
        configure_logs(self._config.monitoring, "coordinator")
        storage = self._config.storage
        if self._catalog is None:
            self._catalog = Catalog(storage.root, storage.catalog_url)
        if self._ledger is None:
            self._ledger = Ledger(storage.root)
        return self._catalog, self._ledger

    def _make_group(self, name: str, model: ModelConfig) -> RayGroup:
        whitelist, monitoring = self._config.losses.whitelist, self._config.monitoring

        def device_of(num_gpus: int) -> str:
            return self._fleet.device_of(name, num_gpus)  # looked up late: the fleet is being made

        return RayGroup(model, self._engine, whitelist, name, monitoring, device_of)

    def _grow(self) -> None:
        """Let the other groups serve too, beside those that do."""
        if self._plane is None or time.monotonic() - self._failed_at < _RELOAD_S:
            return
        for name in self._fleet.groups:
            joining = self._joining.get(name)
            if name not in self._served and (joining is None or joining.done()):
                self._joining[name] = asyncio.create_task(self._join(name))

    async def _join(self, name: str) -> None:
        """Start one group and let it serve. It may have to wait for room, and others wait for nobody."""
        try:
            await self._fleet.start(name)
        except Exception as error:
            bug = None if isinstance(error, LoadError) else error
            _log.error(
                "%s did not start: %s; it is tried again in %g s", name, error, _RELOAD_S, exc_info=bug
            )
            self._failed_at = time.monotonic()
            return
        assert self._plane is not None
        self._served.add(name)
        self._plane.add_group(name, self._fleet.groups[name], self._fleet.model_of(name))
        _log.warning("%s serves", name)


def find_or_create(deployment: Deployment, engine: str = ENGINE) -> Any:
    """A handle of the deployment's coordinator, which outlives the caller. Blocks for milliseconds."""
    actor = ray.remote(Coordinator).options(
        name=NAME,
        namespace=NAMESPACE,
        lifetime="detached",
        get_if_exists=True,
        max_restarts=-1,
        max_concurrency=MAX_WAITING_CALLS,
        num_cpus=0,
    )
    return actor.remote(deployment, engine)


def find() -> Any:
    """A handle of the coordinator. Raises ValueError if there is none."""
    return ray.get_actor(NAME, namespace=NAMESPACE)
