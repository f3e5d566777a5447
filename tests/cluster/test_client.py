"""The coordinator's client while Ray is away or another replica is faster; test_coordinator has real Ray."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
import ray
from ray.exceptions import ActorUnavailableError, GetTimeoutError, RayError

from twinkle_serve.cluster import client as client_module
from twinkle_serve.cluster import coordinator
from twinkle_serve.cluster.client import CoordinatorClient
from twinkle_serve.cluster.coordinator import Status
from twinkle_serve.cluster.deployment import Deployment
from twinkle_serve.config import Config


class Method:
    """Of an actor: ``remote`` is the coroutine function."""

    def __init__(self, function: Any) -> None:
        self.remote = function


class Handle:
    """Of a coordinator which serves any deployment, unless ``is_old``."""

    def __init__(self, is_old: bool = False) -> None:
        self.is_old = is_old
        self.pings: asyncio.Queue[None] = asyncio.Queue()
        self.ping_error: RayError | None = None
        self.num_stops = 0
        for name in ("adopt", "ping", "stop"):
            setattr(self, name, Method(getattr(self, f"_{name}")))

    async def _adopt(self, deployment: Deployment) -> bool:
        return not self.is_old

    async def _ping(self) -> Status:
        if self.ping_error is not None:
            raise self.ping_error
        self.pings.put_nowait(None)
        return Status("ready", "ready", deployed_at=float("inf"))

    async def _stop(self) -> None:
        self.num_stops += 1


@pytest.fixture
def client(monkeypatch: pytest.MonkeyPatch) -> CoordinatorClient:
    monkeypatch.setattr(client_module, "_RETRY_S", 0.0)
    tree = {"models": [{"name": "a", "path": "/m"}], "ray": {"orphan_exit_s": 0.01}}
    return CoordinatorClient(Deployment(Config.model_validate(tree)))


def _found(monkeypatch: pytest.MonkeyPatch, *answers: Handle | Exception) -> list[Handle | Exception]:
    """Let the coordinator be looked for with these answers, then with the last one for ever."""
    left = list(answers)

    def find_or_create(*_: object) -> Handle:
        answer = left.pop(0) if len(left) > 1 else left[0]
        if isinstance(answer, Exception):
            raise answer
        return answer

    monkeypatch.setattr(coordinator, "find_or_create", find_or_create)
    return left


AWAY = GetTimeoutError("the GCS does not answer")
FASTER = ValueError("the name is taken")


@pytest.mark.parametrize("error", [AWAY, FASTER])
async def test_pings_go_on_after_the_coordinator_could_not_be_found(
    client: CoordinatorClient, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    first, second = Handle(), Handle()
    left = _found(monkeypatch, first, error, error, second)
    async with client.attached(), asyncio.timeout(60):
        await first.pings.get()
        first.ping_error = ActorUnavailableError("it is away", None)
        await second.pings.get()
    assert left == [second]


@pytest.mark.parametrize("error", [AWAY, FASTER])
async def test_a_replica_starts_when_the_coordinator_is_found_at_the_second_try(
    client: CoordinatorClient, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    handle = Handle()
    _found(monkeypatch, error, handle)
    async with client.attached(), asyncio.timeout(60):
        await handle.pings.get()


async def test_an_old_coordinator_is_stopped_and_killed_even_if_ray_is_away_in_between(
    client: CoordinatorClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    old, new = Handle(is_old=True), Handle()
    _found(monkeypatch, old, old, new)
    kills: list[object] = []

    def kill(handle: object, no_restart: bool) -> None:
        kills.append(handle)
        if len(kills) == 1:
            raise AWAY

    monkeypatch.setattr(ray, "kill", kill)
    async with client.attached(), asyncio.timeout(60):
        await new.pings.get()
    assert kills == [old, old]
    assert old.num_stops == 2
