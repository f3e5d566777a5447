"""A group of rank workers that share one base model: started, fed with ticks, watched, killed, rebuilt.

Knows Ray actors, placement and deadlines. Does not know what a tick holds, what an outcome means, or which
rank is to blame for a standstill (watch.py). The first sign of a lost rank (death, an exception, silence)
ends the whole group: its peers may already hang in a collective that will never finish.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import re
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import suppress
from typing import Any, cast

import ray
from ray.exceptions import RayError, RayTaskError
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from twinkle_serve.cluster.devices import devices
from twinkle_serve.cluster.objects import brought_here
from twinkle_serve.cluster.watch import until_stalled
from twinkle_serve.cluster.worker import CONCURRENCY, NextItem, RankWorker, is_short
from twinkle_serve.config import ModelConfig, MonitoringConfig
from twinkle_serve.control.group import GroupLost
from twinkle_serve.engine.sharding.place import RankPlace
from twinkle_serve.loss_config import WhitelistedLoss
from twinkle_serve.protocol.work import Failure, ModelInfo, Outcome, Progress, Tick, TickReport

_log = logging.getLogger(__name__)
ENGINE = "twinkle_serve.engine.engine:Engine"
# A CPU rank is not counted against the node's cores: the machine is shared with the ingress, and a bundle
# must ask for something.
_CPU_SHARE = 0.01
_STOP_S = 3.0


_HEARING_S = 3.0
_BROKEN_COLLECTIVE = re.compile("gloo|nccl|Dist(Backend|Network|Store)Error|connection (closed|reset)", re.I)


class LoadError(Exception):
    """The base model could not be loaded; the message is one line for the operator."""


@dataclasses.dataclass(frozen=True, slots=True)
class _Finished:
    """A rank has done its part of the tick."""

    rank: int


@dataclasses.dataclass(frozen=True, slots=True)
class _Lost:
    """Why the group is of no use any more. is_echo: a peer's end may be the cause of this."""

    reason: str
    is_echo: bool = False


_Item = Outcome | Progress | TickReport | _Finished | _Lost


class RayGroup:
    """control.group.Group over ``config.ranks`` worker actors. Call ``start`` before anything else."""

    def __init__(
        self,
        config: ModelConfig,
        engine: str = ENGINE,
        losses: Sequence[WhitelistedLoss] = (),
        name: str | None = None,
        monitoring: MonitoringConfig | None = None,
        device_of: Callable[[int], str] | None = None,
    ) -> None:
        """losses: those that each rank loads before the model. name: of the group, if its model has more.
        monitoring: how ranks log. device_of: on what to compute if the cluster has so many GPUs, where other
        groups need some too."""
        self._config = config
        self._monitoring = monitoring or MonitoringConfig()
        self._name = name or config.name
        self._losses = losses
        self._device_of = device_of or (lambda num_gpus: devices([config], num_gpus)[config.name])
        self._engine = engine
        self._workers: list[Any] = []
        self._placement: PlacementGroup | None = None
        self._info: ModelInfo | None = None
        self._speaker_is_away = False
        self._ready = False

    @property
    def info(self) -> ModelInfo:
        assert self._info is not None, "the group was never started"
        return self._info

    @property
    def was_started(self) -> bool:
        """The model was loaded once."""
        return self._info is not None

    @property
    def ready(self) -> bool:
        """The model is loaded, has stepped, and no rank has been lost since."""
        return self._ready

    async def start(self) -> ModelInfo:
        """Start the ranks and load the model. Raises LoadError."""
        config = self._config
        try:
            async with asyncio.timeout(config.load_deadline_s):
                self._info = await self._start()
        except TimeoutError:
            self.kill()
            found = "no room for its ranks" if not self._workers else "it is not loaded"
            raise LoadError(f"{self._name}: {found} after {config.load_deadline_s:g} s") from None
        except RayError as error:
            _log.error("loading %s failed: %s", self._name, error)
            self.kill()
            raise LoadError(f"cannot load {self._name} from {config.path}: {_reason(error)}") from None
        self._ready = True
        return self._info

    async def _start(self) -> ModelInfo:
        device, resources = self._device()
        config = self._config.model_copy(update={"device": device})
        self._placement = placement_group([resources] * config.ranks, strategy=config.placement.upper())
        await self._placement.ready()
        actor = ray.remote(concurrency_groups=CONCURRENCY)(RankWorker)
        self._workers = [
            actor.options(
                num_cpus=resources.get("CPU", 0),
                num_gpus=resources.get("GPU", 0),
                scheduling_strategy=PlacementGroupSchedulingStrategy(self._placement, rank),
            ).remote(config, rank, self._engine, self._losses, self._name, self._monitoring)
            for rank in range(config.ranks)
        ]
        places: list[RankPlace | None] = [None]
        if config.ranks > 1:
            address = await self._workers[0].address.remote()
            # A collective only gives up when a tick would be given up anyhow: unlike the ranks that wait, the
            # watch knows whether the one they wait for is slow or stuck.
            timeout_s = config.tick_deadline_s
            places = [RankPlace(rank, config.ranks, address, timeout_s) for rank in range(config.ranks)]
        loading = [worker.load.remote(place) for worker, place in zip(self._workers, places, strict=True)]
        infos: list[ModelInfo] = await asyncio.gather(*loading)
        node_id = await self._workers[0].node.remote()
        self._speaker_is_away = node_id != ray.get_runtime_context().get_node_id()
        return infos[0]

    def _device(self) -> tuple[str, dict[str, float]]:
        """And what each rank asks Ray for."""
        num_gpus = int(ray.cluster_resources().get("GPU", 0))
        device = self._device_of(num_gpus)
        if device == "cuda":
            return device, {"GPU": 1}
        if num_gpus and self._config.device == "auto":
            why = "%s runs on the CPU: %d GPUs are too few for its ranks and the models before it"
            _log.warning(why, self._name, num_gpus)
        return device, {"CPU": _CPU_SHARE}

    async def rebuild(self) -> ModelInfo:
        """Replace every rank by a new one; all slots are empty afterwards. Raises LoadError."""
        self.kill()
        return await self.start()

    async def stop(self) -> None:
        """End the ranks in order if they can, else as ``kill`` does."""
        self._ready = False
        with suppress(RayError, TimeoutError):
            async with asyncio.timeout(_STOP_S):
                await asyncio.gather(*(worker.close.remote() for worker in self._workers))
        self.kill()

    def kill(self) -> None:
        """End every rank at once."""
        self._ready = False
        for worker in self._workers:
            ray.kill(worker, no_restart=True)
        self._workers = []
        if self._placement is not None:
            remove_placement_group(self._placement)
            self._placement = None

    async def check_loss(self, graph: str) -> Failure | None:
        """See control.group.Group: the first rank tries it, between two ticks."""
        if not self._ready:
            raise GroupLost(f"{self._name} is not loaded")
        try:
            return cast("Failure | None", await self._workers[0].check_loss.remote(graph))
        except RayError as error:
            # Not to be tried again: it may be what the rank died of.
            _log.error("trying an uploaded loss failed: %s", error)
            return Failure("the server failed while it tried this loss", "server")

    async def run(self, tick: Tick) -> AsyncIterator[Outcome | Progress | TickReport]:
        """See control.group.Group. An outcome's value is an ObjectRef where it is large."""
        if not self._ready:
            raise GroupLost(f"{self._name} is not loaded")
        items: asyncio.Queue[_Item] = asyncio.Queue()
        finished: set[int] = set()
        tasks = [
            asyncio.create_task(self._follow(rank, worker, tick, items))
            for rank, worker in enumerate(self._workers)
        ]
        tasks.append(asyncio.create_task(self._watch(tick, items, finished)))
        deadline = asyncio.get_running_loop().time() + self._config.tick_deadline_s
        try:
            while len(finished) < len(self._workers):
                async with asyncio.timeout_at(deadline):
                    item = await items.get()
                if isinstance(item, _Lost):
                    raise GroupLost((await self._cause(item, items)).reason)
                if isinstance(item, _Finished):
                    finished.add(item.rank)
                else:
                    yield item
        except TimeoutError:
            limit = self._config.tick_deadline_s
            lost = GroupLost(f"{self._name}: a tick was not finished in {limit:g} s")
            self._end(lost)
            raise lost from None
        except GroupLost as lost:
            self._end(lost)
            raise
        finally:
            for task in tasks:
                task.cancel()

    def _end(self, lost: GroupLost) -> None:
        _log.error("%s; the group is ended", lost)
        self.kill()

    async def _watch(self, tick: Tick, items: asyncio.Queue[_Item], finished: set[int]) -> None:
        """Put a _Lost into ``items`` when a rank stands still."""
        deadline_s = self._config.stall_deadline_s
        reason = await until_stalled(self._name, deadline_s, self._workers, tick.tick_id, lambda: finished)
        items.put_nowait(_Lost(reason))

    async def _cause(self, first: _Lost, items: asyncio.Queue[_Item]) -> _Lost:
        """What ended the group. A broken collective is only what the others see of it, so they are heard."""
        with suppress(TimeoutError):
            async with asyncio.timeout(_HEARING_S):
                while first.is_echo:
                    item = await items.get()
                    if isinstance(item, _Lost) and not item.is_echo:
                        return item
        return first

    async def _kept(self, reference: Any) -> Any:
        """A result that nobody fetches may be asked for when the node it was computed on is long gone."""
        return await brought_here(reference) if self._speaker_is_away else reference

    async def _follow(self, rank: int, worker: Any, tick: Tick, items: asyncio.Queue[_Item]) -> None:
        """Put one rank's outcomes into ``items``, then a _Finished, or a _Lost if it dies or raises."""
        try:
            if is_short(tick):
                for item in await worker.run_short_tick.remote(tick):
                    items.put_nowait(item)
            else:
                stream = worker.run_tick.remote(tick)
                async for reference in stream:
                    item = await reference
                    if isinstance(item, Outcome) and isinstance(item.value, NextItem):
                        value = await anext(stream)
                        # If the rank died before it was stored, Ray hands out a reference to the error and
                        # ends the stream as if all were well. What is there is only mapped.
                        await value
                        item = dataclasses.replace(item, value=await self._kept(value))
                    items.put_nowait(item)
            items.put_nowait(_Finished(rank))
        except RayError as error:
            _log.error("rank %d of %s is lost: %s", rank, self._name, error)
            reason = _reason(error)
            items.put_nowait(_Lost(f"rank {rank} of {self._name}: {reason}", _is_echo(error)))


def _is_echo(error: RayError) -> bool:
    """Whether a rank only says that a collective broke."""
    cause = getattr(error, "cause", None) if isinstance(error, RayTaskError) else None
    return cause is not None and bool(_BROKEN_COLLECTIVE.search(f"{type(cause).__name__} {cause}"))


def _reason(error: RayError) -> str:
    cause = getattr(error, "cause", None) if isinstance(error, RayTaskError) else None
    text = str(cause or error).strip() or type(cause or error).__name__
    return text.splitlines()[0]
