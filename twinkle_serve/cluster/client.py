"""The Backend of an ingress replica: each call goes to the coordinator actor.

Knows how to find the coordinator, also after it was made anew, and what Ray's errors mean for a client. Keeps
no state that another replica would need.
"""

from __future__ import annotations

import asyncio
import functools
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, cast

import ray
from ray.exceptions import RayError, RayTaskError

from twinkle_serve.cluster import coordinator
from twinkle_serve.cluster.objects import resolve
from twinkle_serve.config import Config
from twinkle_serve.control.backend import Backend
from twinkle_serve.control.spans import TRACE_PARENT
from twinkle_serve.protocol.errors import BackendUnavailable

__all__ = ["CoordinatorClient", "resolve"]
_log = logging.getLogger(__name__)


class CoordinatorClient:
    """Has every method of Backend. They raise NotFound, Invalid or BackendUnavailable; an unexpected error
    is a RuntimeError whose traceback is in the coordinator's log."""

    def __init__(self, config: Config, engine: str = coordinator.ENGINE) -> None:
        self._config = config
        self._engine = engine
        self._handle: Any = None

    def __getattr__(self, name: str) -> Any:
        if name not in coordinator.METHODS:
            raise AttributeError(name)
        return functools.partial(self._call, name)

    @property
    def backend(self) -> Backend:
        return cast(Backend, self)

    @asynccontextmanager
    async def attached(self, _: object = None) -> AsyncIterator[None]:
        """Start the coordinator if there is none, and keep it alive while the block lasts.

        One that serves another configuration is replaced: this is how a new ``serve deploy`` takes effect.
        """
        self._handle = await self._find_or_create()
        if not await self._handle.serves.remote(self._config):
            _log.warning("the configuration has changed: the coordinator is replaced")
            ray.kill(self._handle, no_restart=True)
            self._handle = await self._find_or_create()
        pinging = asyncio.create_task(self._keep_alive())
        try:
            yield
        finally:
            pinging.cancel()

    async def _find_or_create(self) -> Any:
        return await asyncio.to_thread(coordinator.find_or_create, self._config, self._engine)

    async def _keep_alive(self) -> None:
        while True:
            try:
                await self._handle.ping.remote()
            except RayError as error:
                _log.warning("the coordinator does not answer: %s", error)
                self._handle = await self._find_or_create()
            await asyncio.sleep(self._config.ray.orphan_exit_s / 8)

    async def _call(self, method: str, *arguments: Any) -> Any:
        try:
            reply = await self._handle.call.remote(method, arguments, TRACE_PARENT.get())
        except RayTaskError:
            raise RuntimeError(f"the coordinator failed in {method}") from None
        except RayError as error:
            _log.warning("%s: the coordinator does not answer: %s", method, type(error).__name__)
            raise BackendUnavailable("the service is restarting; try again") from None
        if isinstance(reply, coordinator.Refusal):
            raise reply.error or BackendUnavailable(reply.message)
        return reply
