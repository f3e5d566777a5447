"""The traps of the wire protocol that are the control plane's to avoid, each by its number."""

from __future__ import annotations

import asyncio

from tests.control.echo_group import EchoGroup, pass_command
from tests.control.plane import TENANT, Client, control_plane, make_config, optim, prompt
from tests.control.virtual_time import virtual
from twinkle_serve.control.backend import RejectedCommand, SaveCommand, SnapshotCommand
from twinkle_serve.protocol.work import Failure


def now() -> float:
    return asyncio.get_running_loop().time()


@virtual
async def test_trap_11_a_submission_waits_for_nothing(tmp_path):
    group = EchoGroup(pass_s=1000.0)
    async with control_plane(tmp_path, group) as plane:
        client = await Client(plane).open()
        run = await client.create()
        await client.submit(run, 1, pass_command("stuck"))
        await asyncio.sleep(1.0)
        started = now()
        ids = [await client.submit(run, seq_id, pass_command("x")) for seq_id in (5, 4, 3)]
        assert now() == started
        assert len(set(ids)) == 3


@virtual
async def test_trap_12_commands_run_in_the_order_of_seq_ids(tmp_path):
    async with control_plane(tmp_path) as plane:
        client = await Client(plane).open()
        run = await client.create()
        step = await client.submit(run, 4, optim())
        chunks = [await client.submit(run, n, pass_command(f"chunk {n}")) for n in (2, 3, 1)]
        assert (await client.result(step))["history"] == (
            "create",
            "chunk 1",
            "chunk 2",
            "chunk 3",
            "optim 1",
        )
        assert [(await client.result(chunk))[-1] for chunk in chunks] == ["chunk 2", "chunk 3", "chunk 1"]


@virtual
async def test_trap_13_a_future_can_be_polled_before_its_predecessor_is_known(tmp_path):
    async with control_plane(tmp_path) as plane:
        client = await Client(plane).open()
        run = await client.create()
        second = await client.submit(run, 2, pass_command("b"))
        assert (await plane.poll(TENANT, second, 30.0)).state == "pending"
        polling = asyncio.create_task(client.result(second))
        await asyncio.sleep(1.0)
        await client.submit(run, 1, pass_command("a"))
        assert await polling == ("create", "a", "b")


@virtual
async def test_trap_14_a_rejected_request_spends_its_seq_id_in_its_turn(tmp_path):
    async with control_plane(tmp_path) as plane:
        client = await Client(plane).open()
        run = await client.create()
        rejected = await client.submit(run, 2, RejectedCommand(Failure("loss_fn 'x' is not served")))
        third = await client.submit(run, 3, pass_command("c"))
        assert (await plane.poll(TENANT, rejected, 1.0)).state == "pending"
        await client.submit(run, 1, pass_command("a"))
        assert await client.failure(rejected) == Failure("loss_fn 'x' is not served", "user")
        assert await client.result(third) == ("create", "a", "c")


@virtual
async def test_trap_15_a_request_that_is_sent_twice_runs_once(tmp_path):
    async with control_plane(tmp_path) as plane:
        client = await Client(plane).open()
        run = await client.create()
        first = await client.submit(run, 1, optim())
        again = await client.submit(run, 1, optim())
        value = await client.result(first)
        after = await client.submit(run, 1, optim())
        assert first == again == after
        assert value["history"] == ("create", "optim 1")
        assert (await client.do(run, 2, optim()))["history"] == ("create", "optim 1", "optim 1")


@virtual
async def test_trap_15_a_model_that_is_created_twice_is_one_model(tmp_path):
    group = EchoGroup()
    async with control_plane(tmp_path, group) as plane:
        client = await Client(plane).open()
        assert await client.create(3) == await client.create(3) == f"{client.session}:train:3"
        assert sum(len(tick.creates) for tick in group.ticks) == 1


@virtual
async def test_trap_16_a_duplicate_that_differs_gets_the_first_result(tmp_path):
    async with control_plane(tmp_path) as plane:
        client = await Client(plane).open()
        run = await client.create()
        first = await client.submit(run, 1, SnapshotCommand(0))
        retried = await client.submit(run, 1, SnapshotCommand(1))
        assert retried == first
        assert await client.result(retried) == {"sampling_session_id": f"{client.session}:sample:0"}


@virtual
async def test_trap_17_a_taken_name_is_a_failed_future_and_publishing_twice_is_nothing(tmp_path):
    async with control_plane(tmp_path) as plane:
        client = await Client(plane).open()
        run = await client.create()
        path = (await client.do(run, 1, SaveCommand("weights", "n")))["path"]
        failure = await client.failure(await client.submit(run, 2, SaveCommand("weights", "n")))
        assert failure.category == "user"
        assert "exists already" in failure.message
        for public in (True, True, False, False):
            await plane.publish_checkpoint(TENANT, path, public)
        assert await client.do(run, 3, pass_command("a")) == ("create", "a")


@virtual
async def test_trap_27_seq_ids_of_cloned_samplers_need_64_bits(tmp_path):
    async with control_plane(tmp_path) as plane:
        client = await Client(plane).open()
        sampler = await plane.create_sampler(TENANT, client.session, 0, "base", None)
        large = 286_206_069_000_000_000
        first = await plane.sample(TENANT, sampler, large, prompt(num_samples=2))
        assert await plane.sample(TENANT, sampler, large, prompt(num_samples=2)) == first
        assert await plane.sample(TENANT, sampler, large + 1, prompt()) != first
        assert len(set(first[1])) == 2


@virtual
async def test_trap_33_later_training_does_not_change_a_snapshot(tmp_path):
    async with control_plane(tmp_path) as plane:
        client = await Client(plane).open()
        run = await client.create()
        await client.submit(run, 1, pass_command("before"))
        snapshot = await client.submit(run, 2, SnapshotCommand(0))
        await client.do(run, 3, pass_command("after"))
        sampler = (await client.result(snapshot))["sampling_session_id"]
        assert await client.result(await client.sample(sampler)) == ("create", "before")


@virtual
async def test_trap_34_a_result_can_be_read_again_until_its_retention_ends(tmp_path):
    config = make_config()
    async with control_plane(tmp_path, config=config) as plane:
        client = await Client(plane).open()
        run = await client.create()
        request = await client.submit(run, 1, pass_command("a"))
        assert await client.result(request) == await client.result(request)
        await asyncio.sleep(config.limits.result_retention_s - 10)
        assert await client.result(request) == ("create", "a")
        await asyncio.sleep(30)
        assert (await client.poll(request)).state == "gone"
        again = await client.submit(run, 1, pass_command("a"))
        assert "too late" in (await client.failure(again)).message


@virtual
async def test_trap_35_what_was_lost_says_whether_it_was_a_sample(tmp_path):
    async with control_plane(tmp_path) as plane:
        client = await Client(plane).open()
        sampler = await plane.create_sampler(TENANT, client.session, 0, "base", None)
        sampling = await client.sample(sampler)
        training = await client.submit(await client.create(), 1, optim())
        assert sampling.startswith("sample-")
        assert training.startswith("train-")
        assert (await plane.poll(TENANT, "sample-of-an-earlier-life", 30.0)).state == "gone"


@virtual
async def test_trap_39_sessions_and_samplers_are_made_without_the_group(tmp_path):
    group = EchoGroup(pass_s=1000.0)
    async with control_plane(tmp_path, group) as plane:
        client = await Client(plane).open()
        run = await client.create()
        path = (await client.do(run, 1, SaveCommand("sampler_weights", "n")))["path"]
        await client.submit(run, 2, pass_command("stuck"))
        await asyncio.sleep(1.0)
        started, ticks = now(), len(group.ticks)
        second = await Client(plane).open()
        await plane.create_sampler(TENANT, second.session, 0, None, path)
        await plane.create_sampler(TENANT, second.session, 1, "base", None)
        assert await plane.heartbeat(TENANT, second.session)
        await plane.run_info(TENANT, run)
        assert (now(), len(group.ticks)) == (started, ticks)
