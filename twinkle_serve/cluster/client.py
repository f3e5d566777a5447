"""The Backend of an ingress replica: each call goes to the coordinator actor.

Knows how to find the coordinator, also after it was made anew, and what Ray's errors mean for a client. Keeps
no state that another replica would need.
"""

from __future__ import annotations

import asyncio
import functools
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Any, cast

import ray
from ray.exceptions import RayError, RayTaskError

from twinkle_serve.cluster import coordinator
from twinkle_serve.cluster.deployment import Deployment
from twinkle_serve.cluster.objects import resolve
from twinkle_serve.control.backend import Backend
from twinkle_serve.control.spans import TRACE_PARENT
from twinkle_serve.protocol.errors import BackendUnavailable

__all__ = ["CoordinatorClient", "resolve"]
_log = logging.getLogger(__name__)
_RETRY_S = 0.2
_PATIENCE_S = 120.0  # a poll is held for less
_STOP_S = 20.0  # what runs gets half of it to come to its end


class CoordinatorClient:
    """Has every method of Backend. They raise NotFound, Invalid or BackendUnavailable; an unexpected error
    is a RuntimeError whose traceback is in the coordinator's log."""

    def __init__(self, deployment: Deployment, engine: str = coordinator.ENGINE) -> None:
        self._deployment = deployment
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

        One that cannot serve this deployment is replaced: this is how a new ``serve deploy`` takes effect.
        """
        await self._attach()
        pinging = asyncio.create_task(self._keep_alive())
        try:
            yield
        finally:
            pinging.cancel()

    async def _attach(self) -> None:
        while True:
            try:
                handle = await asyncio.to_thread(coordinator.find_or_create, self._deployment, self._engine)
                if await handle.adopt.remote(self._deployment):
                    self._handle = handle
                    return
                _log.warning("the deployment has changed: the coordinator is replaced")
                await _end(handle)
            except (RayError, ValueError) as error:
                # Ray itself may be away for a while, and another replica may be faster (a ValueError).
                _log.warning("the coordinator does not answer: %s", error)
                await asyncio.sleep(_RETRY_S)

    async def _keep_alive(self) -> None:
        while True:
            try:
                status = await self._handle.ping.remote()
                if status.deployed_at < self._deployment.deployed_at:
                    await self._attach()  # it was started again, as it was made at first
            except RayError as error:
                _log.warning("the coordinator does not answer: %s", error)
                await self._attach()
            await asyncio.sleep(self._deployment.config.ray.orphan_exit_s / 8)

    async def _call(self, method: str, *arguments: Any) -> Any:
        try:
            async with asyncio.timeout(_PATIENCE_S):
                reply = await self._handle.call.remote(method, arguments, TRACE_PARENT.get())
        except TimeoutError:
            _log.error("%s: the coordinator does not answer in %g s", method, _PATIENCE_S)
            raise BackendUnavailable("the service does not answer; try again") from None
        except RayTaskError:
            raise RuntimeError(f"the coordinator failed in {method}") from None
        except RayError as error:
            _log.warning("%s: the coordinator does not answer: %s", method, type(error).__name__)
            raise BackendUnavailable("the service is restarting; try again") from None
        if isinstance(reply, coordinator.Refusal):
            raise reply.error or BackendUnavailable(reply.message)
        return reply


async def _end(handle: Any) -> None:
    with suppress(RayError, TimeoutError):
        async with asyncio.timeout(_STOP_S):
            await handle.stop.remote()
    ray.kill(handle, no_restart=True)
