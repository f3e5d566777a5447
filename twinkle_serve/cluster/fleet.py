"""All groups of a deployment: those that are there and those that still have to be started.

Knows group names and which base model each group has. Does not know ranks (group.py) or runs (control/).
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

from twinkle_serve.cluster.group import LoadError, RayGroup
from twinkle_serve.config import Config, ModelConfig
from twinkle_serve.control.groups import group_names, sampling_group_names

_log = logging.getLogger(__name__)
MakeGroup = Callable[[str, ModelConfig], RayGroup]


class Fleet:
    """The groups that ``config`` asks for; ``cover`` may ask for more later."""

    def __init__(self, config: Config, make: MakeGroup) -> None:
        self._make = make
        self._models: dict[str, ModelConfig] = {}
        self.groups: dict[str, RayGroup] = {}
        self.cover(config)

    def cover(self, config: Config) -> None:
        """Make the groups of ``config`` that are not there yet. They are started by ``start``."""
        for model in config.models:
            for name in group_names(model):
                if name not in self.groups:
                    self._models[name] = model
                    self.groups[name] = self._make(name, model)

    def model_of(self, name: str) -> ModelConfig:
        return self._models[name]

    @property
    def started(self) -> dict[str, RayGroup]:
        """By name: those that were loaded once. What becomes of them later is their drivers' business."""
        return {name: group for name, group in self.groups.items() if group.was_started}

    @property
    def missing(self) -> list[str]:
        return [name for name, group in self.groups.items() if not group.was_started]

    async def start(self) -> list[str]:
        """Start all that are missing, at once. Returns the reasons of those that could not be."""
        asked = (self.groups[name].start() for name in self.missing)
        results = await asyncio.gather(*asked, return_exceptions=True)
        reasons = []
        for result in results:
            if isinstance(result, LoadError):
                reasons.append(str(result))
            elif isinstance(result, BaseException):
                raise result
        return reasons

    async def start_enough(self) -> None:
        """Start all that are missing. Raises LoadError if a base model then has no group that trains; for the
        rest, and for models that come to be served meanwhile, it is enough to try again later."""
        models = dict(self._models)
        reasons = await self.start()
        trained = {
            model.name
            for name, model in models.items()
            if self.groups[name].was_started and name not in sampling_group_names(model)
        }
        if any(model.name not in trained for model in models.values()):
            raise LoadError("; ".join(dict.fromkeys(reasons)))
        for reason in reasons:
            _log.error("%s; the other groups of this model serve without it", reason)

    async def stop(self) -> None:
        await asyncio.gather(*(group.stop() for group in self.groups.values()))
