"""All groups of a deployment: those that are there and those that still have to be started.

Knows group names and which base model each group has. Does not know ranks (group.py) or runs (control/).
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Collection, Mapping
from typing import Any

from twinkle_serve.cluster.devices import devices
from twinkle_serve.cluster.group import LoadError, RayGroup
from twinkle_serve.config import Config, ModelConfig
from twinkle_serve.control.groups import group_names, sampling_group_names

_log = logging.getLogger(__name__)
MakeGroup = Callable[[str, ModelConfig], RayGroup]
# Groups of one model load at about the same pace, and the runs of an earlier life are shared out among those
# that are there when the service starts.
_GRACE_S = 60.0


class Fleet:
    """The groups that ``config`` asks for; ``cover`` may ask for more later."""

    def __init__(self, config: Config, make: MakeGroup, grace_s: float = _GRACE_S) -> None:
        """grace_s: how long ``start_enough`` waits for groups that it could do without, seconds."""
        self._make = make
        self._grace_s = grace_s
        self._starts: dict[str, asyncio.Task[Any]] = {}  # whose outcome nobody has heard yet
        self._models: dict[str, ModelConfig] = {}  # by name of the group
        # By name of the model, what was there first before the rest.
        self._wanted: dict[str, ModelConfig] = {}
        self.groups: dict[str, RayGroup] = {}
        self.cover(config)

    def cover(self, config: Config) -> None:
        """Make the groups of ``config`` that are not there yet. They are started by ``start``."""
        for model in config.models:
            self._wanted[model.name] = model
            for name in group_names(model):
                if name not in self.groups:
                    self._models[name] = model
                    self.groups[name] = self._make(name, model)

    def model_of(self, name: str) -> ModelConfig:
        return self._models[name]

    def device_of(self, name: str, num_gpus: int) -> str:
        """Of a group, in a cluster with so many GPUs for all groups together."""
        return devices(self._wanted.values(), num_gpus)[self._models[name].name]

    @property
    def started(self) -> dict[str, RayGroup]:
        """By name: those that were loaded once. What becomes of them later is their drivers' business."""
        return {name: group for name, group in self.groups.items() if group.was_started}

    @property
    def missing(self) -> list[str]:
        return [name for name, group in self.groups.items() if not group.was_started]

    async def start(self, name: str) -> None:
        """Start one group, or hear of its start that is under way or over. Raises LoadError."""
        start = self._begin(name)
        await asyncio.wait([start])
        del self._starts[name]
        start.result()

    async def start_enough(self) -> None:
        """Start all that are missing. Returns when each base model has a group that trains, and all others
        were given ``grace_s`` more: a group without room must not keep a loaded one away for an hour. What is
        still under way then goes on, for ``start`` to hear of.

        Raises LoadError as soon as a base model is left without a group that trains; for the rest, and for
        models that come to be served meanwhile, it is enough to try again later.
        """
        models = dict(self._models)
        starts = {name: self._begin(name) for name in self.missing}
        pending = starts
        while not _all_train(models, self.started) and _all_train(models, {*self.started, *pending}):
            await asyncio.wait(pending.values(), return_when=asyncio.FIRST_COMPLETED)
            pending = {name: start for name, start in starts.items() if not start.done()}
        are_enough = _all_train(models, self.started)
        if are_enough and pending:
            await asyncio.wait(pending.values(), timeout=self._grace_s)
        over = {name: self._starts.pop(name) for name, start in starts.items() if start.done()}
        errors = {name: error for name, start in over.items() if (error := start.exception()) is not None}
        bugs = {name: error for name, error in errors.items() if not isinstance(error, LoadError)}
        if not are_enough:
            if bugs:
                raise next(iter(bugs.values()))
            raise LoadError("; ".join(dict.fromkeys(map(str, errors.values()))))
        for name, error in errors.items():
            why = "%s did not start: %s; the other groups of this model serve without it"
            _log.error(why, name, error, exc_info=bugs.get(name))

    def _begin(self, name: str) -> asyncio.Task[Any]:
        if name not in self._starts:
            self._starts[name] = asyncio.create_task(self.groups[name].start())
        return self._starts[name]

    async def stop(self) -> None:
        for start in self._starts.values():
            start.cancel()
        await asyncio.gather(*self._starts.values(), return_exceptions=True)
        await asyncio.gather(*(group.stop() for group in self.groups.values()))


def _all_train(models: Mapping[str, ModelConfig], groups: Collection[str]) -> bool:
    """Whether each base model has one of ``groups`` in which runs can live. models: by name of the group."""
    trained = {
        model.name
        for name, model in models.items()
        if name in groups and name not in sampling_group_names(model)
    }
    return all(model.name in trained for model in models.values())
