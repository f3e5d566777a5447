"""Sessions, samplers and samples as a client of the control plane sees them."""

from __future__ import annotations

import asyncio

import pytest

from tests.control.echo_group import EchoGroup, pass_command
from tests.control.plane import TENANT, Client, control_plane, prompt
from tests.control.virtual_time import virtual
from twinkle_serve.control.backend import (
    Invalid,
    NotFound,
    SaveCommand,
    SnapshotCommand,
)
from twinkle_serve.protocol.work import Failure


def now() -> float:
    return asyncio.get_running_loop().time()


@virtual
async def test_only_the_newest_snapshots_of_a_run_are_kept(tmp_path):
    group = EchoGroup()
    async with control_plane(tmp_path, group) as plane:
        client = await Client(plane).open()
        run = await client.create()
        samplers = []
        for n in range(7):
            samplers.append((await client.do(run, n + 1, SnapshotCommand(n)))["sampling_session_id"])
        await asyncio.sleep(1)
        assert sorted(group.snapshots) == samplers[3:]
        with pytest.raises(NotFound, match="only the newest 4 unnamed snapshots"):
            await client.sample(samplers[2])
        await client.result(await client.sample(samplers[3]))


@virtual
async def test_an_old_snapshot_lives_on_while_it_is_sampled_from(tmp_path):
    group = EchoGroup()
    async with control_plane(tmp_path, group) as plane:
        client = await Client(plane).open()
        run = await client.create()
        sampler = (await client.do(run, 1, SnapshotCommand(0)))["sampling_session_id"]
        sample = await client.sample(sampler, max_tokens=200)
        await client.do(run, 2, pass_command("later"))
        for n in range(1, 7):
            await client.do(run, n + 2, SnapshotCommand(n))
        assert sampler in group.snapshots
        assert await client.result(sample) == ("create",)
        await asyncio.sleep(1)
        assert sampler not in group.snapshots


@virtual
async def test_samples_decode_while_training_goes_on(tmp_path):
    async with control_plane(tmp_path) as plane:
        client = await Client(plane).open()
        run = await client.create()
        sampler = await plane.create_sampler(TENANT, client.session, 0, "base", None)
        sample = await client.sample(sampler, max_tokens=500)
        for n in range(10):
            await client.do(run, n + 1, pass_command("p"))
        assert (await plane.poll(TENANT, sample, 0)).state == "pending"
        assert await client.result(sample) == ()


@virtual
async def test_one_long_request_of_many_samples_keeps_no_other_tenant_waiting(tmp_path):
    async with control_plane(tmp_path) as plane:
        samplers = {}
        clients = {name: await Client(plane, name).open() for name in ("alice", "bob")}
        for name, client in clients.items():
            samplers[name] = await plane.create_sampler(name, client.session, 0, "base", None)
        long = await clients["alice"].sample(samplers["alice"], 1, max_tokens=40_000, num_samples=256)
        await asyncio.sleep(1)
        before = now()
        await clients["bob"].result(await clients["bob"].sample(samplers["bob"], 1))
        assert now() - before < 1
        assert dict(plane._drivers["base"]._flights.sequences) == {"alice": 64}
        await plane.cancel("alice", long)


@virtual
async def test_cancelled_samples_end_wherever_they_are(tmp_path):
    group = EchoGroup()
    async with control_plane(tmp_path, group) as plane:
        client = await Client(plane).open()
        sampler = await plane.create_sampler(TENANT, client.session, 0, "base", None)
        decoding = await client.sample(sampler, 0, max_tokens=10_000)
        await asyncio.sleep(1)
        queued = await client.sample(sampler, 1, max_tokens=10_000, num_samples=200)
        for request in (queued, decoding):
            await plane.cancel("bob", request)
            assert (await plane.poll(TENANT, request, 0)).state == "pending"
            await plane.cancel(TENANT, request)
            await plane.cancel(TENANT, request)
            assert (await client.failure(request)).message == "cancelled"
        await plane.cancel(TENANT, "sample-unknown")
        await asyncio.sleep(1)
        assert group.active == {}
        ticks = len(group.ticks)
        await asyncio.sleep(10)
        assert len(group.ticks) == ticks


@virtual
async def test_a_sample_that_the_gateway_refused_is_a_failed_promise(tmp_path):
    async with control_plane(tmp_path) as plane:
        client = await Client(plane).open()
        sampler = await plane.create_sampler(TENANT, client.session, 0, "base", None)
        request, sequences = await plane.sample(TENANT, sampler, 0, Failure("top_p 2 is above 1"))
        assert len(sequences) == 1
        assert (await client.failure(request)).message == "top_p 2 is above 1"
        request, sequences = await plane.sample(TENANT, sampler, 1, prompt(num_samples=257))
        assert "num_samples 257 is above 256" in (await client.failure(request)).message


@virtual
async def test_samplers_are_deduped_described_and_need_a_source(tmp_path):
    async with control_plane(tmp_path) as plane:
        client = await Client(plane).open()
        first = await plane.create_sampler(TENANT, client.session, 0, "base", None)
        assert first == f"{client.session}:sample:0"
        assert await plane.create_sampler(TENANT, client.session, 0, "base", None) == first
        info = await plane.sampler_info(TENANT, first)
        assert (info["base_model"], info["model_path"], info["model"].name) == ("base", None, "base")
        with pytest.raises(Invalid, match="one of base_model and model_path"):
            await plane.create_sampler(TENANT, client.session, 1, None, None)
        with pytest.raises(NotFound):
            await plane.create_sampler(TENANT, client.session, 1, "huge", None)
        with pytest.raises(NotFound):
            await plane.create_sampler(TENANT, client.session, 1, None, "tinker://a/weights/b")
        with pytest.raises(NotFound):
            await client.sample("unknown")


@virtual
async def test_a_deleted_checkpoint_is_not_taken_from_a_sample_that_uses_it(tmp_path):
    removed = []
    async with control_plane(tmp_path) as plane:
        catalog = plane._books.checkpoints._catalog
        catalog.remove_directory = removed.append
        client = await Client(plane).open()
        run = await client.create()
        path = (await client.do(run, 1, SaveCommand("weights", "n")))["path"]
        sampler = await plane.create_sampler(TENANT, client.session, 0, None, path)
        sample = await client.sample(sampler, max_tokens=100)
        await asyncio.sleep(0.1)
        await plane.delete_checkpoint(TENANT, path)
        assert removed == []
        assert await client.result(sample) == ("create",)
        assert len(removed) == 1
        with pytest.raises(NotFound):
            await client.sample(sampler)


@virtual
async def test_the_life_of_a_session(tmp_path):
    async with control_plane(tmp_path) as plane:
        client = Client(plane)
        client.session = await plane.create_session(
            TENANT, {"user_metadata": {"n": 1}, "display_name": "mine"}
        )
        run = await client.create()
        sampler = await plane.create_sampler(TENANT, client.session, 0, "base", None)
        assert await plane.get_session(TENANT, client.session) == {
            "training_run_ids": [run],
            "sampler_ids": [sampler],
            "user_metadata": {"n": "1"},
            "display_name": "mine",
        }
        assert await plane.heartbeat(TENANT, client.session)
        await plane.finish_session(TENANT, client.session, {"type": "success"})
        await plane.finish_session(TENANT, client.session, {"type": "errored"})
        assert not await plane.heartbeat(TENANT, client.session)
        with pytest.raises(Invalid, match="finished"):
            await client.create(1)


@virtual
async def test_finishing_a_session_frees_its_snapshots(tmp_path):
    group = EchoGroup()
    async with control_plane(tmp_path, group) as plane:
        client = await Client(plane).open()
        await client.do(await client.create(), 1, SnapshotCommand(0))
        assert group.snapshots
        await plane.finish_session(TENANT, client.session, {"type": "success"})
        await asyncio.sleep(1)
        assert not group.snapshots


@virtual
async def test_an_inflight_sampler_follows_what_is_published_and_running_samples_do_not(tmp_path):
    group = EchoGroup()
    async with control_plane(tmp_path, group) as plane:
        client = await Client(plane).open()
        run = await client.create()
        await client.do(run, 1, pass_command("one"))
        first = (await client.do(run, 2, SnapshotCommand(0, inflight=True)))["sampling_session_id"]
        running = await client.sample(first, max_tokens=500)
        await client.do(run, 3, pass_command("two"))
        assert await client.result(await client.sample(first)) == ("create", "one")
        second = (await client.do(run, 4, SnapshotCommand(1, inflight=True)))["sampling_session_id"]
        for sampler in (first, second):
            assert await client.result(await client.sample(sampler)) == ("create", "one", "two")
        assert await client.result(running) == ("create", "one")
        await asyncio.sleep(1)
        assert list(group.snapshots) == [second]
