"""The control plane as a client sees it, over a group that echoes what was done to each run."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest

from tests.control.echo_group import EchoGroup, pass_command
from tests.control.plane import TENANT, Client, control_plane, make_config, optim
from tests.control.virtual_time import VirtualClock, virtual
from twinkle_serve.config import Config
from twinkle_serve.control.backend import (
    Invalid,
    LoadCommand,
    NotFound,
    SaveCommand,
    SnapshotCommand,
    UnloadCommand,
)
from twinkle_serve.control.service import ControlPlane
from twinkle_serve.protocol.data import LoraSpec
from twinkle_serve.protocol.errors import BackendUnavailable
from twinkle_serve.protocol.work import Failure
from twinkle_serve.storage.catalog import Catalog


def now() -> float:
    return asyncio.get_running_loop().time()


@virtual
async def test_a_run_trains_saves_loads_and_samples(tmp_path):
    async with control_plane(tmp_path) as plane:
        client = await Client(plane).open()
        run = await client.create()
        assert run == f"{client.session}:train:0"
        assert await client.do(run, 1, pass_command("a")) == ("create", "a")
        assert (await client.do(run, 2, optim()))["history"] == ("create", "a", "optim 1")
        saved = await client.do(run, 3, SaveCommand("weights", "first"))
        assert saved["path"] == f"tinker://{run}/weights/first"
        await client.do(run, 4, pass_command("b"))
        await client.do(run, 5, LoadCommand(saved["path"], True))
        forward = pass_command("c", backward=False)
        assert await client.do(run, 6, forward) == ("create", "a", "optim 1", "load")
        snapshot = await client.do(run, 7, SnapshotCommand(0))
        await client.do(run, 8, pass_command("d"))
        sampler = snapshot["sampling_session_id"]
        assert sampler == f"{client.session}:sample:0"
        assert await client.result(await client.sample(sampler, 0)) == ("create", "a", "optim 1", "load")


@virtual
async def test_more_runs_than_slots_page_in_and_out(tmp_path):
    async with control_plane(tmp_path, EchoGroup(max_slots=2)) as plane:
        client = await Client(plane).open()
        runs = [await client.create(number) for number in range(7)]
        for n in range(3):
            await asyncio.gather(*(client.submit(run, n + 1, pass_command(f"{run} {n}")) for run in runs))
        for run in runs:
            expected = ("create", *(f"{run} {n}" for n in range(3)), "optim 1")
            assert (await client.do(run, 4, optim()))["history"] == expected


@virtual
async def test_a_bad_request_fails_alone(tmp_path):
    async with control_plane(tmp_path) as plane:
        client = await Client(plane).open()
        run = await client.create()
        bad = await client.submit(run, 1, pass_command("bad shape"))
        good = await client.submit(run, 2, pass_command("good"))
        assert await client.failure(bad) == Failure("bad shape is bad")
        assert await client.result(good) == ("create", "good")


@virtual
async def test_a_hole_is_given_up_on_time_and_the_run_goes_on(tmp_path):
    async with control_plane(tmp_path, config=make_config(gap_timeout_s=300)) as plane:
        client = await Client(plane).open()
        run = await client.create()
        await client.do(run, 1, pass_command("a"))
        started = now()
        waiting = [await client.submit(run, n, pass_command(str(n))) for n in (4, 3)]
        for request in waiting:
            assert "seq_id 2 did not arrive within 300 s" in (await client.failure(request)).message
        assert now() - started == pytest.approx(300, abs=0.1)
        late = await client.failure(await client.submit(run, 2, pass_command("late")))
        assert "too late" in late.message
        assert await client.do(run, 5, pass_command("e")) == ("create", "a", "e")


@virtual
async def test_each_base_model_has_its_own_time_for_a_hole(tmp_path):
    config = Config.model_validate(
        {
            "models": [
                {"name": name, "path": "nowhere", "planner": {"gap_timeout_s": seconds}}
                for name, seconds in (("base", 300), ("quick", 5))
            ]
        }
    )
    groups = {name: EchoGroup(name) for name in ("base", "quick")}
    plane = ControlPlane(groups, Catalog(tmp_path, "sqlite://"), config, VirtualClock())
    await plane.start()
    client = await Client(plane).open()
    for number, (base_model, seconds) in enumerate((("base", 300), ("quick", 5))):
        birth = await plane.create_model(TENANT, client.session, number, base_model, LoraSpec(8), {})
        run = (await client.result(birth))["model_id"]
        started = now()
        waiting = await client.submit(run, 2, pass_command("b"))
        assert f"did not arrive within {seconds} s" in (await client.failure(waiting)).message
        assert now() - started == pytest.approx(seconds, abs=0.1)
    await plane.close()


@virtual
async def test_a_second_hole_is_given_up_too(tmp_path):
    async with control_plane(tmp_path, config=make_config(gap_timeout_s=300)) as plane:
        client = await Client(plane).open()
        run = await client.create()
        for lost, waiting in ((1, 2), (3, 4)):
            request = await client.submit(run, waiting, optim())
            assert f"seq_id {lost} did not" in (await client.failure(request)).message


@virtual
async def test_a_hole_that_opens_while_another_is_watched_is_given_up_in_its_own_time(tmp_path):
    async with control_plane(tmp_path, config=make_config(gap_timeout_s=300)) as plane:
        client = await Client(plane).open()
        run = await client.create()
        waiting = [await client.submit(run, n, optim()) for n in (2, 4)]
        await asyncio.sleep(200)
        await client.do(run, 1, pass_command("a"))
        closed = now()
        await client.result(waiting[0])
        assert "seq_id 3 did not arrive" in (await client.failure(waiting[1])).message
        assert now() - closed == pytest.approx(300, abs=0.2)


# creating ---------------------------------------------------------------------------------------------


@virtual
async def test_a_new_run_can_start_from_a_checkpoint_of_another(tmp_path):
    async with control_plane(tmp_path) as plane:
        client = await Client(plane).open()
        run = await client.create(rank=4)
        await client.do(run, 1, pass_command("a"))
        path = (await client.do(run, 2, SaveCommand("weights", "n")))["path"]
        request = await plane.create_model_from(TENANT, client.session, 1, path, True, None, {})
        other = f"{client.session}:train:1"
        assert await client.result(request) == {"model_id": other, "path": path}
        assert (await plane.run_info(TENANT, other)).spec.rank == 4
        assert await client.do(other, 1, pass_command("b")) == ("create", "a", "load", "b")
        assert await client.do(run, 3, pass_command("c")) == ("create", "a", "c")


@pytest.mark.parametrize("rank", [0, -1, 33])
def test_a_rank_out_of_range_is_refused_with_the_limit(tmp_path, rank):
    @virtual
    async def attempt():
        async with control_plane(tmp_path) as plane:
            client = await Client(plane).open()
            with pytest.raises(Invalid, match="between 1 and 32"):
                await client.create(rank=rank)
            assert await client.create() == f"{client.session}:train:0"

    attempt()


@virtual
async def test_a_checkpoint_of_a_rank_that_is_no_longer_served_starts_no_run(tmp_path):
    group = EchoGroup()
    async with control_plane(tmp_path, group) as plane:
        client = await Client(plane).open()
        run = await client.create(rank=16)
        path = (await client.do(run, 1, SaveCommand("weights", "n")))["path"]
        group.info = replace(group.info, max_rank=8)
        with pytest.raises(Invalid, match="has rank 16; base is served up to rank 8"):
            await plane.create_model_from(TENANT, client.session, 1, path, True, None, {})


@virtual
async def test_creation_needs_a_served_model_a_session_and_a_checkpoint(tmp_path):
    async with control_plane(tmp_path) as plane:
        client = await Client(plane).open()
        with pytest.raises(NotFound, match="base model 'huge' is not served here; there is: base"):
            await plane.create_model(TENANT, client.session, 0, "huge", LoraSpec(8), {})
        with pytest.raises(NotFound, match="session"):
            await plane.create_model(TENANT, "session-unknown", 0, "base", LoraSpec(8), {})
        with pytest.raises(NotFound, match="does not exist"):
            await plane.create_model_from(TENANT, client.session, 0, "tinker://a/weights/b", False, None, {})
        with pytest.raises(Invalid, match="not of the form"):
            await plane.create_model_from(TENANT, client.session, 0, "somewhere", False, None, {})


@virtual
async def test_optimizer_state_must_be_there_to_be_loaded(tmp_path):
    async with control_plane(tmp_path) as plane:
        client = await Client(plane).open()
        run = await client.create()
        path = (await client.do(run, 1, SaveCommand("sampler_weights", "n")))["path"]
        with pytest.raises(Invalid, match="has no optimizer state"):
            await plane.create_model_from(TENANT, client.session, 1, path, True, None, {})
        failure = await client.failure(await client.submit(run, 2, LoadCommand(path, True)))
        assert "has no optimizer state" in failure.message
        assert (await client.do(run, 3, LoadCommand(path, False)))["path"] == path


@virtual
async def test_a_load_of_another_shape_fails_and_leaves_the_run_alone(tmp_path):
    async with control_plane(tmp_path) as plane:
        client = await Client(plane).open()
        small, large = await client.create(0, rank=4), await client.create(1, rank=16)
        path = (await client.do(small, 1, SaveCommand("weights", "n")))["path"]
        failure = await client.failure(await client.submit(large, 1, LoadCommand(path, True)))
        assert "rank 4" in failure.message
        assert "rank 16" in failure.message
        assert failure.category == "user"
        assert await client.do(large, 2, pass_command("a")) == ("create", "a")


@virtual
async def test_a_run_whose_checkpoint_cannot_be_read_says_so_and_can_still_be_loaded(tmp_path):
    group = EchoGroup()
    async with control_plane(tmp_path, group) as plane:
        client = await Client(plane).open()
        run = await client.create()
        good = (await client.do(run, 1, SaveCommand("weights", "good")))["path"]
        bad = (await client.do(run, 2, SaveCommand("weights", "bad")))["path"]
        del group.stored[group.ticks[-1].saves[0].directory]
        request = await plane.create_model_from(TENANT, client.session, 1, bad, False, None, {})
        assert "missing" in (await client.failure(request)).message
        other = f"{client.session}:train:1"
        assert "no adapter" in (await client.failure(await client.submit(other, 1, optim()))).message
        await client.do(other, 2, LoadCommand(good, False))
        assert await client.do(other, 3, pass_command("a")) == ("create", "load", "a")


@virtual
async def test_unloading_frees_the_slot_and_ends_the_run(tmp_path):
    group = EchoGroup(max_slots=1)
    async with control_plane(tmp_path, group) as plane:
        client = await Client(plane).open()
        run = await client.create()
        path = (await client.do(run, 1, SaveCommand("weights", "n")))["path"]
        sampler = (await client.do(run, 2, SnapshotCommand(0)))["sampling_session_id"]
        assert await client.do(run, 3, UnloadCommand()) == {"model_id": run}
        await asyncio.sleep(1)
        assert group.slots == [None]
        assert group.snapshots == {}
        with pytest.raises(NotFound, match="unloaded"):
            await client.submit(run, 4, optim())
        with pytest.raises(NotFound):
            await client.sample(sampler)
        assert (await plane.weights_info(TENANT, path))["lora_rank"] == 8


@virtual
async def test_nothing_that_was_sent_after_an_unload_runs(tmp_path):
    group = EchoGroup(max_slots=1)
    async with control_plane(tmp_path, group) as plane:
        client = await Client(plane).open()
        run = await client.create()
        path = (await client.do(run, 1, SaveCommand("weights", "n")))["path"]
        later = [await client.submit(run, n, c) for n, c in ((3, optim()), (4, LoadCommand(path, True)))]
        await client.do(run, 2, UnloadCommand())
        for request in later:
            assert "was unloaded" in (await client.failure(request)).message
        assert group.slots == [None]


# tenants ----------------------------------------------------------------------------------------------


@virtual
async def test_another_tenants_objects_do_not_exist(tmp_path):
    async with control_plane(tmp_path) as plane:
        alice, bob = await Client(plane).open(), await Client(plane, "bob").open()
        run = await alice.create()
        request = await alice.submit(run, 1, SaveCommand("weights", "n"))
        path = (await alice.result(request))["path"]
        sampler = await plane.create_sampler(TENANT, alice.session, 9, None, path)
        assert (await bob.poll(request)).state == "gone"
        bob.session, own = alice.session, bob.session
        for attempt in (
            bob.submit(run, 2, optim()),
            bob.create(1),
            bob.sample(sampler),
            plane.run_info("bob", run),
            plane.get_run("bob", run),
            plane.list_checkpoints("bob", run, None, 0),
            plane.heartbeat("bob", alice.session),
            plane.finish_session("bob", alice.session, {}),
            plane.get_session("bob", alice.session),
            plane.sampler_info("bob", sampler),
            plane.create_sampler("bob", own, 0, None, path),
            plane.weights_info("bob", path),
            plane.delete_checkpoint("bob", path),
            plane.publish_checkpoint("bob", path, True),
            plane.set_checkpoint_ttl("bob", path, 7200),
            plane.checkpoint_files("bob", path),
        ):
            with pytest.raises(NotFound):
                await attempt
        assert await plane.list_runs("bob", 10, 0) == ([], 0)
        assert await plane.list_checkpoints("bob", None, None, 0) == ([], 0)
        assert await plane.list_sessions("bob", 10, 0) == [own]


@virtual
async def test_a_published_checkpoint_can_be_read_by_all_and_changed_by_its_owner(tmp_path):
    async with control_plane(tmp_path) as plane:
        alice, bob = await Client(plane).open(), await Client(plane, "bob").open()
        path = (await alice.do(await alice.create(), 1, SaveCommand("weights", "n")))["path"]
        await plane.publish_checkpoint(TENANT, path, True)
        sampler = await plane.create_sampler("bob", bob.session, 0, None, path)
        assert await bob.result(await bob.sample(sampler)) == ("create",)
        with pytest.raises(NotFound):
            await plane.delete_checkpoint("bob", path)
        await plane.publish_checkpoint(TENANT, path, False)
        with pytest.raises(NotFound):
            await bob.sample(sampler)


@virtual
async def test_a_heavy_tenant_does_not_hold_up_a_light_one(tmp_path):
    async with control_plane(tmp_path, config=make_config(tick_tokens=1000)) as plane:
        heavy, light = await Client(plane, "heavy").open(), await Client(plane, "light").open()
        big, small = await heavy.create(), await light.create()
        for n in range(200):
            last = await heavy.submit(big, n + 1, pass_command("p", 500))
        started = now()
        await light.do(small, 1, pass_command("q", 10))
        assert now() - started < 3 * 0.06
        await heavy.result(last)


# lives ------------------------------------------------------------------------------------------------


@virtual
async def test_listings_survive_a_restart(tmp_path):
    group = EchoGroup()
    group.on_disk = True
    async with control_plane(tmp_path, group, url=None) as plane:
        client = await Client(plane).open()
        run = await client.create()
        path = (await client.do(run, 1, SaveCommand("external_weights", "n")))["path"]
        sampler = (await client.do(run, 2, SnapshotCommand(0)))["sampling_session_id"]
        base = await plane.create_sampler(TENANT, client.session, 1, "base", None)
        view = await plane.get_run(TENANT, run)
        unloaded = await client.create(1)
        await client.do(unloaded, 1, UnloadCommand())
    async with control_plane(tmp_path, url=None) as plane:
        again = Client(plane)
        again.session = client.session
        assert (await plane.get_session(TENANT, client.session))["training_run_ids"] == [run, unloaded]
        assert await plane.heartbeat(TENANT, client.session)
        assert await again.result(await again.sample(base)) == ()
        with pytest.raises(NotFound):
            await again.sample(sampler)
        assert await plane.create_sampler(TENANT, client.session, 0, "base", None) == sampler
        restored = await plane.get_run(TENANT, run)
        assert restored == view | {"last_request_time": restored["last_request_time"]}
        (checkpoint,), _ = await plane.list_checkpoints(TENANT, run, None, 0)
        assert checkpoint["tinker_path"] == path
        assert all(file.startswith("/") for file in (await plane.checkpoint_files(TENANT, path)).values())
        failure = await again.failure(await again.submit(run, 17, optim()))
        assert "restarted" in failure.message
        assert failure.category == "server"
        duplicate = await plane.create_model(TENANT, client.session, 0, "base", LoraSpec(8), {})
        assert "restarted" in (await again.failure(duplicate)).message
        with pytest.raises(NotFound, match="unloaded"):
            await again.submit(unloaded, 2, optim())


@virtual
async def test_closing_answers_everything(tmp_path):
    async with control_plane(tmp_path, EchoGroup(pass_s=1000.0)) as plane:
        client = await Client(plane).open()
        run = await client.create()
        stuck = await client.submit(run, 1, pass_command("stuck"))
        parked = await client.submit(run, 3, optim())
        polls = [asyncio.create_task(client.failure(request)) for request in (stuck, parked)]
        await asyncio.sleep(1)
        started = now()
        await plane.close(timeout_s=10)
        assert now() - started <= 10.5
        for poll in polls:
            assert await poll == Failure("the server is shutting down", "server")
        assert not await plane.healthy()
        with pytest.raises(BackendUnavailable):
            await client.submit(run, 2, optim())


@virtual
async def test_closing_lets_the_tick_end(tmp_path):
    async with control_plane(tmp_path, EchoGroup(pass_s=2.0)) as plane:
        client = await Client(plane).open()
        request = await client.submit(await client.create(), 1, pass_command("a"))
        await asyncio.sleep(1)
        await plane.close(timeout_s=10)
        assert await client.result(request) == ("create", "a")
