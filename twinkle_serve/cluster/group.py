"""A group of rank workers that share one base model: started, fed with ticks, watched, killed, rebuilt.

Knows Ray actors, placement and deadlines. Does not know what a tick holds or what an outcome means. The
first sign of a lost rank (death, an exception, a missed deadline) ends the whole group: its peers may
already hang in a collective that will never finish.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
from collections.abc import AsyncIterator
from contextlib import suppress
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from twinkle_serve.cluster.worker import NextItem, RankWorker
from twinkle_serve.config import ModelConfig
from twinkle_serve.control.group import GroupLost
from twinkle_serve.protocol.work import ModelInfo, Outcome, Progress, Tick, TickReport

_log = logging.getLogger(__name__)
ENGINE = "twinkle_serve.engine.engine:Engine"
# A CPU rank is not counted against the node's cores: the machine is shared with the ingress, and a bundle
# must ask for something.
_CPU_SHARE = 0.01
_STOP_S = 3.0


class LoadError(Exception):
    """The base model could not be loaded; the message is one line for the operator."""


class RayGroup:
    """control.group.Group over ``config.ranks`` worker actors. Call ``start`` before anything else."""

    def __init__(self, config: ModelConfig, engine: str = ENGINE) -> None:
        self._config = config
        self._engine = engine
        self._workers: list[Any] = []
        self._placement: PlacementGroup | None = None
        self._info: ModelInfo | None = None
        self._ready = False

    @property
    def info(self) -> ModelInfo:
        assert self._info is not None, "the group was never started"
        return self._info

    @property
    def ready(self) -> bool:
        """The model is loaded, has stepped, and no rank has been lost since."""
        return self._ready

    async def start(self) -> ModelInfo:
        """Start the ranks and load the model. Raises LoadError."""
        device, resources = _device(self._config)
        config = self._config.model_copy(update={"device": device})
        self._placement = placement_group([resources] * config.ranks, strategy="PACK")
        await self._placement.ready()
        actor = ray.remote(RankWorker)
        for rank in range(config.ranks):
            self._workers.append(
                actor.options(
                    num_cpus=resources.get("CPU", 0),
                    num_gpus=resources.get("GPU", 0),
                    scheduling_strategy=PlacementGroupSchedulingStrategy(self._placement, rank),
                ).remote(config, rank, self._engine)
            )
        try:
            infos = await asyncio.gather(*(worker.load.remote() for worker in self._workers))
        except RayError as error:
            _log.error("loading %s failed: %s", config.name, error)
            self.kill()
            raise LoadError(f"cannot load {config.name} from {config.path}: {_reason(error)}") from None
        self._info = infos[0]
        self._ready = True
        return infos[0]

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

    async def run(self, tick: Tick) -> AsyncIterator[Outcome | Progress | TickReport]:
        """See control.group.Group. An outcome's value is an ObjectRef where it is large."""
        if not self._ready:
            raise GroupLost(f"{self._config.name} is not loaded")
        deadline = asyncio.get_running_loop().time() + self._config.tick_deadline_s
        items: asyncio.Queue[Outcome | Progress | TickReport | GroupLost | None] = asyncio.Queue()
        followers = [
            asyncio.create_task(self._follow(rank, worker, tick, items))
            for rank, worker in enumerate(self._workers)
        ]
        try:
            finished = 0
            while finished < len(followers):
                async with asyncio.timeout_at(deadline):
                    item = await items.get()
                if isinstance(item, GroupLost):
                    raise item
                if item is None:
                    finished += 1
                else:
                    yield item
        except TimeoutError:
            lost = GroupLost(
                f"{self._config.name}: no answer to a tick in {self._config.tick_deadline_s:g} s"
            )
            _log.error("%s; the group is ended", lost)
            self.kill()
            raise lost from None
        except GroupLost:
            self.kill()
            raise
        finally:
            for follower in followers:
                follower.cancel()

    async def _follow(self, rank: int, worker: Any, tick: Tick, items: asyncio.Queue[Any]) -> None:
        """Put one rank's outcomes into ``items``, then None, or a GroupLost if it dies or raises."""
        try:
            stream = worker.run_tick.remote(tick)
            async for reference in stream:
                item = await reference
                if isinstance(item, Outcome) and isinstance(item.value, NextItem):
                    item = dataclasses.replace(item, value=await anext(stream))
                items.put_nowait(item)
            items.put_nowait(None)
        except RayError as error:
            _log.error("rank %d of %s is lost: %s", rank, self._config.name, error)
            items.put_nowait(GroupLost(f"rank {rank} of {self._config.name}: {_reason(error)}"))


def _device(config: ModelConfig) -> tuple[str, dict[str, float]]:
    device = config.device
    if device == "auto":
        device = "cuda" if ray.cluster_resources().get("GPU", 0) >= config.ranks else "cpu"
    return device, {"GPU": 1} if device == "cuda" else {"CPU": _CPU_SHARE}


def _reason(error: RayError) -> str:
    cause = getattr(error, "cause", None) if isinstance(error, RayTaskError) else None
    text = str(cause or error).strip() or type(cause or error).__name__
    return text.splitlines()[0]
