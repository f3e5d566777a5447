"""What every handler needs: the backend, the configuration, the caller, and what rarely changes.

Knows how to reach them from a request. Keeps no state that another replica would need.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Annotated, Any, TypeVar

from fastapi import Depends, Request

from twinkle_serve.config import Config
from twinkle_serve.control.backend import Backend
from twinkle_serve.gateway.http import read_body, read_object
from twinkle_serve.gateway.identity import Identity
from twinkle_serve.gateway.links import Links
from twinkle_serve.protocol.batch import DatumLimits
from twinkle_serve.protocol.sample import SampleLimits
from twinkle_serve.protocol.work import ModelInfo

Value = TypeVar("Value")
_CACHE_SIZE = 4096


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
    # The model behind a run or a sampler never changes, and its limits are needed for every request.
    models: dict[tuple[str, str], ModelInfo] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Call:
    """One authenticated request."""

    gateway: Gateway
    backend: Backend
    tenant: str
    name: str

    async def body(self, request: Request) -> bytes:
        return await read_body(request, self.gateway.config.http.max_body_bytes)

    async def object(self, request: Request) -> dict[str, Any]:
        return await read_object(request, self.gateway.config.http.max_body_bytes)

    async def datum_limits(self, run_id: str) -> DatumLimits:
        """Raises NotFound."""
        model = self._known(run_id)
        if model is None:
            model = self._remember(run_id, (await self.backend.run_info(self.tenant, run_id)).model)
        limits = self.gateway.config.limits
        return DatumLimits(
            model.vocab_size,
            model.max_context_length,
            limits.max_datums_per_request,
            self.gateway.config.http.max_body_bytes // 8,
        )

    async def sample_limits(self, sampler_id: str) -> SampleLimits:
        """Raises NotFound."""
        model = self._known(sampler_id)
        if model is None:
            info = await self.backend.sampler_info(self.tenant, sampler_id)
            model = self._remember(sampler_id, info["model"])
        return SampleLimits(
            model.vocab_size,
            model.max_context_length,
            model.eos_token_ids,
            self.gateway.config.limits.max_num_samples,
        )

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


async def authenticate(request: Request) -> Call:
    """Raises Unauthorized or BackendUnavailable."""
    gateway = gateway_of(request)
    caller = await gateway.identity.identify(request.headers)
    return Call(gateway, gateway.backend_provider(), caller.tenant, caller.name)


Authenticated = Annotated[Call, Depends(authenticate)]
