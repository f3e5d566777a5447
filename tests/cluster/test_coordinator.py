"""The coordinator actor and its client over real Ray, with an engine that computes nothing."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import ray

from twinkle_serve.cluster import coordinator
from twinkle_serve.cluster.client import CoordinatorClient, resolve
from twinkle_serve.config import Config, ModelConfig, RayConfig, StorageConfig
from twinkle_serve.control.backend import Backend, Invalid, NotFound, OptimCommand, PassCommand, Poll
from twinkle_serve.protocol.data import AdamParams, DatumBatch, ForwardResult, LoraSpec
from twinkle_serve.protocol.errors import BackendUnavailable

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("ray_cluster")]
STANDIN = "tests.cluster.standin_engine:StandinEngine"


@pytest.fixture
def config(standin: ModelConfig, tmp_path: Path) -> Config:
    return Config(models=[standin], storage=StorageConfig(root=tmp_path / "store"))


@asynccontextmanager
async def _client(config: Config) -> AsyncIterator[CoordinatorClient]:
    client = CoordinatorClient(config, STANDIN)
    async with client.attached():
        yield client


@pytest.fixture
async def client(config: Config) -> AsyncIterator[CoordinatorClient]:
    async with _client(config) as client:
        await _until(client, lambda status: status.state != "loading")
        yield client
    await _end()


async def _end() -> None:
    handle = coordinator.find()
    await handle.stop.remote()
    ray.kill(handle, no_restart=True)


async def _until(client: CoordinatorClient, true: Callable[[coordinator.Status], bool]) -> coordinator.Status:
    async with asyncio.timeout(60):
        while True:
            try:
                status: coordinator.Status = await coordinator.find().ping.remote()
                if true(status):
                    return status
            except (ray.exceptions.RayActorError, ValueError):
                pass
            await asyncio.sleep(0.05)


def _command(loss_fn: str = "fine", **loss_config: float) -> PassCommand:
    return PassCommand(_datums(), (3,), loss_fn, loss_config, backward=True)


def _datums() -> bytes:
    import numpy as np

    return DatumBatch(np.arange(3, dtype=np.int32), np.array([3])).pack()


async def _answer(backend: Backend, request_id: str) -> Poll:
    async with asyncio.timeout(60):
        while (poll := await backend.poll("t", request_id, 5.0)).state == "pending":
            pass
    return poll


async def _new_run(backend: Backend) -> str:
    session = await backend.create_session("t", {})
    created = await backend.create_model("t", session, 0, "tiny", LoraSpec(rank=8), {})
    poll = await _answer(backend, created)
    return str(poll.value["model_id"])


async def test_a_run_is_made_and_trained(client: CoordinatorClient) -> None:
    backend = client.backend
    assert await backend.healthy()
    run_id = await _new_run(backend)
    ids = [await backend.submit("t", run_id, 1, _command())]
    ids.append(await backend.submit("t", run_id, 2, OptimCommand(AdamParams())))
    forward, step = [await _answer(backend, request_id) for request_id in ids]
    assert isinstance(forward.value, ForwardResult)
    assert step.failure is None


async def test_errors_meant_for_the_client_arrive_as_they_are(client: CoordinatorClient) -> None:
    with pytest.raises(NotFound):
        await client.backend.run_info("t", "nobody:train:0")
    session = await client.backend.create_session("t", {})
    with pytest.raises(Invalid, match="rank 99"):
        await client.backend.create_model("t", session, 0, "tiny", LoraSpec(rank=99), {})


async def test_a_bug_is_not_shown_to_the_client(client: CoordinatorClient) -> None:
    with pytest.raises(RuntimeError, match=r"the coordinator failed in create_session$") as caught:
        await client._call("create_session")
    assert "TypeError" not in str(caught.value)
    with pytest.raises(AttributeError):
        _ = client.stop_everything


async def test_large_results_travel_as_references(client: CoordinatorClient) -> None:
    run_id = await _new_run(client.backend)
    request_id = await client.backend.submit("t", run_id, 1, _command(floats=200_000))
    poll = await _answer(client.backend, request_id)
    assert isinstance(poll.value, ray.ObjectRef)
    assert (await resolve(poll.value)).logprobs.values.size == 200_000
    assert await resolve("small") == "small"


async def test_two_replicas_share_one_coordinator_and_the_run_survives_a_replica(config: Config) -> None:
    async with _client(config) as one:
        await _until(one, lambda status: status.state == "ready")
        async with _client(config) as other:
            run_id = await _new_run(other.backend)
        request_id = await one.backend.submit("t", run_id, 1, _command())
        assert (await _answer(one.backend, request_id)).failure is None
    await _end()


async def test_a_request_that_kills_its_rank_is_given_up_and_the_service_goes_on(
    client: CoordinatorClient,
) -> None:
    run_id = await _new_run(client.backend)
    request_id = await client.backend.submit("t", run_id, 1, _command("die"))
    poll = await _answer(client.backend, request_id)
    assert poll.failure is not None
    assert "died each time" in poll.failure.message
    after = await client.backend.submit("t", run_id, 2, _command())
    assert (await _answer(client.backend, after)).failure is None
    another = await _new_run(client.backend)
    request_id = await client.backend.submit("t", another, 1, _command())
    assert (await _answer(client.backend, request_id)).failure is None


async def test_a_dead_coordinator_comes_back_and_knows_the_runs(client: CoordinatorClient) -> None:
    run_id = await _new_run(client.backend)
    ray.kill(coordinator.find(), no_restart=False)
    with pytest.raises(BackendUnavailable):
        await _until_refused(client, run_id)
    await _until(client, lambda status: status.state == "ready")
    run = await client.backend.get_run("t", run_id)
    assert run["training_run_id"] == run_id
    await _new_run(client.backend)


async def _until_refused(client: CoordinatorClient, run_id: str) -> None:
    async with asyncio.timeout(60):
        while True:
            await client.backend.get_run("t", run_id)


async def test_a_model_that_cannot_be_loaded_says_why(config: Config, standin: ModelConfig) -> None:
    broken = config.model_copy(update={"models": [standin.model_copy(update={"path": "missing"})]})
    async with _client(broken) as client:
        status = await _until(client, lambda status: status.state != "loading")
        assert status == coordinator.Status("failed", "cannot load tiny from missing: no config.json")
        with pytest.raises(BackendUnavailable, match="cannot load tiny"):
            await client.backend.healthy()
    await _end()


async def test_another_configuration_replaces_the_coordinator(
    client: CoordinatorClient, config: Config, standin: ModelConfig
) -> None:
    changed = config.model_copy(update={"models": [standin.model_copy(update={"name": "renamed"})]})
    async with _client(changed) as newer:
        await _until(newer, lambda status: status.state == "ready")
        assert [model.name for model in await newer.backend.models()] == ["renamed"]


async def test_forgotten_by_all_replicas_it_ends_with_its_ranks(config: Config) -> None:
    brief = config.model_copy(update={"ray": RayConfig(orphan_exit_s=2)})
    async with _client(brief) as client:
        await _until(client, lambda status: status.state == "ready")
        run_id = await _new_run(client.backend)
        request_id = await client.backend.submit("t", run_id, 1, OptimCommand(AdamParams()))
        rank_pid = int((await _answer(client.backend, request_id)).value["pid"])
        await asyncio.sleep(3)  # longer than the patience: pings keep it alive
        assert coordinator.find() is not None
    async with asyncio.timeout(60):
        while _exists() or Path(f"/proc/{rank_pid}").exists():
            await asyncio.sleep(0.05)


def _exists() -> bool:
    try:
        coordinator.find()
    except ValueError:
        return False
    return True
