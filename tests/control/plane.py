"""A control plane over EchoGroups in virtual time, and short ways to talk to it."""

from __future__ import annotations

import itertools
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import numpy as np

from tests.control.echo_group import EchoGroup
from tests.control.virtual_time import VirtualClock
from twinkle_serve.config import Config
from twinkle_serve.control.backend import OptimCommand, Poll
from twinkle_serve.control.service import ControlPlane
from twinkle_serve.protocol.data import AdamParams, LoraSpec, SampleRequest, SamplingParams
from twinkle_serve.storage.catalog import Catalog

TENANT = "alice"
FOREVER = 100_000.0


def make_config(**planner: Any) -> Config:
    return Config.model_validate(
        {
            "models": [{"name": "base", "path": "nowhere", "planner": planner}],
            "limits": {"session_expiry_s": 600},
        }
    )


def counting_tokens() -> Any:
    """Ids that are the same in every run."""
    numbers = itertools.count(1)
    return lambda: f"{next(numbers):06d}"


@asynccontextmanager
async def control_plane(
    root: Path,
    group: EchoGroup | None = None,
    config: Config | None = None,
    url: str | None = "sqlite://",
    catalog: Any = None,
    **options,
):
    """A started ControlPlane, closed at the end. Its catalogue is in memory, or with ``url`` None below
    ``root``, where the next one finds it."""
    catalog = catalog or Catalog(root, url)
    group = group or EchoGroup()
    plane = ControlPlane({"base": group}, catalog, config or make_config(), VirtualClock(), **options)
    await plane.start()
    try:
        yield plane
    finally:
        await plane.close()
        catalog.close()


class Client:
    """One SDK client with its session; ``result`` polls as the SDK does."""

    def __init__(self, plane: ControlPlane, tenant: str = TENANT) -> None:
        self.plane = plane
        self.tenant = tenant
        self.session = ""

    async def open(self) -> Client:
        self.session = await self.plane.create_session(self.tenant, {"tags": []})
        return self

    async def result(self, request_id: str) -> Any:
        poll = await self.poll(request_id)
        assert poll.state == "done", poll
        assert poll.failure is None, poll.failure
        return poll.value

    async def failure(self, request_id: str) -> Any:
        poll = await self.poll(request_id)
        assert poll.failure is not None, poll
        return poll.failure

    async def poll(self, request_id: str) -> Poll:
        return await self.plane.poll(self.tenant, request_id, FOREVER)

    async def create(self, number: int = 0, rank: int = 8) -> str:
        """A new run, ready; its id."""
        request_id = await self.plane.create_model(
            self.tenant, self.session, number, "base", LoraSpec(rank), {}
        )
        return (await self.result(request_id))["model_id"]

    async def submit(self, run_id: str, seq_id: int | None, command: Any) -> str:
        return await self.plane.submit(self.tenant, run_id, seq_id, command)

    async def do(self, run_id: str, seq_id: int | None, command: Any) -> Any:
        return await self.result(await self.submit(run_id, seq_id, command))

    async def sample(self, sampler_id: str, seq_id: int | None = None, **fields: Any) -> str:
        request_id, _ = await self.plane.sample(self.tenant, sampler_id, seq_id, prompt(**fields))
        return request_id


def prompt(max_tokens: int = 1, num_samples: int = 1) -> SampleRequest:
    return SampleRequest(np.array([1, 2], np.int32), SamplingParams(max_tokens), num_samples)


def optim(learning_rate: float = 1.0) -> OptimCommand:
    return OptimCommand(AdamParams(learning_rate))
