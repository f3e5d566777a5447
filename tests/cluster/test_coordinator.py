"""The coordinator actor and its client over real Ray, with an engine that computes nothing."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import ray

from twinkle_serve.cluster import client as client_module
from twinkle_serve.cluster import coordinator
from twinkle_serve.cluster.client import CoordinatorClient, resolve
from twinkle_serve.cluster.deployment import Deployment
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
    client = CoordinatorClient(Deployment(config), STANDIN)
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
    # A real engine answers no more than it is given, and by that a coordinator tells large results.
    num_tokens = max(3, int(loss_config.get("floats", 0)))
    return PassCommand(_datums(num_tokens), (num_tokens,), loss_fn, loss_config, backward=True)


def _datums(num_tokens: int) -> bytes:
    import numpy as np

    return DatumBatch(np.zeros(num_tokens, dtype=np.int32), np.array([num_tokens])).pack()


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


async def test_a_large_result_outlives_the_rank_that_made_it(client: CoordinatorClient) -> None:
    run_id = await _new_run(client.backend)
    unfetched = await client.backend.submit("t", run_id, 1, _command(floats=200_000))
    os.kill(int(await _rank_pid(client.backend, run_id, 2)), signal.SIGKILL)
    await _answer(client.backend, await client.backend.submit("t", run_id, 3, _command()))
    poll = await _answer(client.backend, unfetched)
    assert (await resolve(poll.value)).logprobs.values.size == 200_000


async def test_a_coordinator_that_does_not_answer_is_not_waited_for(
    client: CoordinatorClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client_module, "_PATIENCE_S", 0.2)
    run_id = await _new_run(client.backend)
    pid = await coordinator.find().__ray_call__.remote(lambda _: os.getpid())
    os.kill(pid, signal.SIGSTOP)
    try:
        with pytest.raises(BackendUnavailable, match="does not answer"):
            await client.backend.get_run("t", run_id)
    finally:
        os.kill(pid, signal.SIGCONT)
    monkeypatch.undo()
    assert (await client.backend.get_run("t", run_id))["training_run_id"] == run_id


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
        assert (status.state, status.message) == ("failed", "cannot load tiny from missing: no config.json")
        with pytest.raises(BackendUnavailable, match=r"^the service could not start; .* in its log$"):
            await client.backend.healthy()
    await _end()


async def test_another_configuration_replaces_the_coordinator(
    client: CoordinatorClient, config: Config, standin: ModelConfig
) -> None:
    changed = config.model_copy(update={"models": [standin.model_copy(update={"name": "renamed"})]})
    async with _client(changed) as newer:
        await _until(newer, lambda status: status.state == "ready")
        assert [model.name for model in await newer.backend.models()] == ["renamed"]


async def test_groups_and_models_are_added_without_touching_what_runs(
    config: Config, standin: ModelConfig
) -> None:
    small = config.model_copy(update={"ray": RayConfig(orphan_exit_s=4)})
    more = [standin.model_copy(update={"groups": 2}), standin.model_copy(update={"name": "other"})]
    grown = small.model_copy(update={"models": more})
    async with _client(small) as older:
        await _until(older, lambda status: status.state == "ready")
        run_id = await _new_run(older.backend)
        pid = await _rank_pid(older.backend, run_id, 1)
        async with _client(grown) as newer:
            async with asyncio.timeout(60):
                while len(await newer.backend.models()) < 2:
                    await asyncio.sleep(0.05)
                while await _rank_pid(newer.backend, another := await _new_run(newer.backend), 1) == pid:
                    await asyncio.sleep(0.05)  # until the second group is up
            assert await _rank_pid(newer.backend, run_id, 2) == pid
            # Made anew it begins as it was made, without the second group, until a replica tells it.
            ray.kill(coordinator.find(), no_restart=False)
            await _until(newer, lambda status: status.state == "ready" and status.deployed_at > 0)
            async with asyncio.timeout(60):
                while len(await _models(newer)) < 2:
                    await asyncio.sleep(0.05)
            await _rank_pid(newer.backend, another, 2)
    await _end()


async def _models(client: CoordinatorClient) -> list[str]:
    try:
        return [model.name for model in await client.backend.models()]
    except BackendUnavailable:
        return []


async def _rank_pid(backend: Backend, run_id: str, seq_id: int) -> float:
    request_id = await backend.submit("t", run_id, seq_id, OptimCommand(AdamParams()))
    pid: float = (await _answer(backend, request_id)).value["pid"]
    return pid


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
