"""What every handler needs: the backend, the configuration, the caller, and what rarely changes.

Knows how to reach them from a request. Keeps no state that another replica would need.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Annotated, Any, TypeVar
from weakref import WeakValueDictionary

from fastapi import Depends, Request

from twinkle_serve.config import Config, TenantLimits
from twinkle_serve.control.backend import Backend
from twinkle_serve.gateway.doors import Doors, Visit
from twinkle_serve.gateway.http import expected_bytes, sent_body
from twinkle_serve.gateway.identity import Identity
from twinkle_serve.gateway.links import Links
from twinkle_serve.gateway.publishing import Publisher
from twinkle_serve.protocol.batch import DatumLimits, dense_room
from twinkle_serve.protocol.bodies import decompress, decompress_small, parse_object
from twinkle_serve.protocol.losses import LossSpec
from twinkle_serve.protocol.requests import MAX_SMALL_BODY_BYTES
from twinkle_serve.protocol.sample import SampleLimits
from twinkle_serve.protocol.work import ModelInfo

Value = TypeVar("Value")
_CACHE_SIZE = 4096
_MAX_LOSSES = 64
_SMALL_BODY_BYTES = 2**16


async def itself(value: Any) -> Any:
    """The default ``resolve``: results are values already, not handles."""
    return value


@dataclass
class Gateway:
    """One replica's parts. ``resolve`` turns the handle in a finished promise into its value."""

    backend_provider: Callable[[], Backend]
    config: Config
    identity: Identity
    links: Links
    resolve: Callable[[Any], Awaitable[Any]] = itself
    whitelist: Mapping[str, LossSpec] = field(default_factory=dict)
    # The model behind a run or a sampler never changes, and its limits are needed for every request.
    models: dict[tuple[str, str], ModelInfo] = field(default_factory=dict)
    # Nor does an uploaded loss.
    losses: dict[tuple[str, str], str] = field(default_factory=dict)
    doors: Doors = field(default_factory=Doors)
    publisher: Publisher | None = None
    # By tenant: held while one of its large requests is decoded.
    decoding: WeakValueDictionary[str, asyncio.Lock] = field(default_factory=WeakValueDictionary)
    # Where that is done: not in the loop's own threads, in which keys are checked and prompts encoded.
    decoders: Executor = field(default_factory=partial(ThreadPoolExecutor, 2, "decoder"))


@dataclass(frozen=True, slots=True)
class Call:
    """One authenticated request."""

    gateway: Gateway
    backend: Backend
    tenant: str
    name: str
    limits: TenantLimits
    visit: Visit

    @property
    def max_body_bytes(self) -> int:
        most = self.gateway.config.http.max_body_bytes
        return most if self.limits.body_bytes is None else min(most, self.limits.body_bytes)

    async def body(self, request: Request, most: int | None = None) -> bytes:
        """most: bytes, where the route has a limit of its own. Raises BodyTooLarge, MalformedBody. Stands in
        line while the tenant's other bodies are too many."""
        max_bytes = self.max_body_bytes if most is None else min(most, self.max_body_bytes)
        await self.visit.hold(expected_bytes(request, max_bytes))
        sent = await sent_body(request, max_bytes)
        encoding = request.headers.get("content-encoding")
        if encoding is None:
            return sent
        unpack = partial(decompress, sent, encoding, max_bytes)
        if encoding != "zstd":
            return unpack()
        # By what it becomes, for 3 KB can become 100 MiB.
        small = decompress_small(sent, min(_SMALL_BODY_BYTES, max_bytes))
        return await self.in_thread(unpack) if small is None else small

    async def object(self, request: Request, most: int = MAX_SMALL_BODY_BYTES) -> dict[str, Any]:
        """The JSON object in the body; {} when there is none. As ``body``; few routes need large ones."""
        body = await self.body(request, most)
        return await self.beside(partial(parse_object, body), len(body))

    async def beside(
        self, work: Callable[[], Value], num_bytes: int, small: int = _SMALL_BODY_BYTES
    ) -> Value:
        """What ``work`` makes of so many bytes: of more than ``small`` in a thread, for they can take seconds
        and here everybody's polls are answered."""
        return work() if num_bytes <= small else await self.in_thread(work)

    async def in_thread(self, work: Callable[[], Value]) -> Value:
        """What ``work`` makes; for one tenant not several at once."""
        async with self.gateway.decoding.setdefault(self.tenant, asyncio.Lock()):
            loop = asyncio.get_running_loop()
            return await loop.run_in_executor(self.gateway.decoders, work)

    async def datum_limits(self, run_id: str, body_bytes: int) -> DatumLimits:
        """Those of a request whose body has so many bytes. Raises NotFound."""
        model = self._known(run_id)
        if model is None:
            model = self._remember(run_id, (await self.backend.run_info(self.tenant, run_id)).model)
        most = self.gateway.config.limits.max_datums_per_request
        return DatumLimits(
            model.vocab_size,
            self._max_length(model),
            most if self.limits.datums is None else min(most, self.limits.datums),
            min(self.max_body_bytes // 8, dense_room(body_bytes)),
        )

    async def custom_loss(self, loss_id: str) -> str:
        """The text of the caller's uploaded loss. Raises NotFound."""
        losses = self.gateway.losses
        if (self.tenant, loss_id) not in losses:
            graph = await self.backend.custom_loss(self.tenant, loss_id)
            if len(losses) >= _MAX_LOSSES:
                del losses[next(iter(losses))]
            losses[self.tenant, loss_id] = graph
        return losses[self.tenant, loss_id]

    async def sample_limits(self, sampler_id: str) -> SampleLimits:
        """Raises NotFound."""
        model = self._known(sampler_id)
        if model is None:
            info = await self.backend.sampler_info(self.tenant, sampler_id)
            model = self._remember(sampler_id, info["model"])
        return self.limits_of(model)

    def limits_of(self, model: ModelInfo) -> SampleLimits:
        return SampleLimits(
            model.vocab_size,
            self._max_length(model),
            model.eos_token_ids,
            self.gateway.config.limits.max_num_samples,
        )

    def _max_length(self, model: ModelInfo) -> int:
        return min(model.max_context_length, self.limits.sequence_tokens or model.max_context_length)

    def _known(self, key: str) -> ModelInfo | None:
        return self.gateway.models.get((self.tenant, key))

    def _remember(self, key: str, model: ModelInfo) -> ModelInfo:
        models = self.gateway.models
        if len(models) >= _CACHE_SIZE:
            del models[next(iter(models))]
        models[self.tenant, key] = model
        return model


def gateway_of(request: Request) -> Gateway:
    gateway: Gateway = request.app.state.gateway
    return gateway


async def authenticate(request: Request) -> AsyncIterator[Call]:
    """Raises Unauthorized, Busy or BackendUnavailable."""
    async with admitted(request, request.headers) as call:
        yield call


@asynccontextmanager
async def admitted(request: Request, headers: Mapping[str, str]) -> AsyncIterator[Call]:
    """The caller whose key is in ``headers``. Raises as ``authenticate``."""
    gateway = gateway_of(request)
    caller = await gateway.identity.identify(headers)
    request.state.tenant = caller.tenant  # for the log
    limits = gateway.config.limits.of(caller.tenant, caller.name)
    with gateway.doors.visit(caller.tenant, limits) as visit:
        yield Call(gateway, gateway.backend_provider(), caller.tenant, caller.name, limits, visit)


authenticated = asynccontextmanager(authenticate)
Authenticated = Annotated[Call, Depends(authenticate)]
