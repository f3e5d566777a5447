"""Checkpoints as a client of the control plane sees them."""

from __future__ import annotations

import asyncio

import pytest

from tests.control.echo_group import EchoGroup, pass_command
from tests.control.plane import TENANT, Client, control_plane
from tests.control.virtual_time import virtual
from twinkle_serve.control.backend import (
    Invalid,
    LoadCommand,
    NotFound,
    SaveCommand,
)


def now() -> float:
    return asyncio.get_running_loop().time()


@virtual
async def test_names_are_checked_and_made_up_if_there_is_none(tmp_path):
    async with control_plane(tmp_path) as plane:
        client = await Client(plane).open()
        run = await client.create()
        for n, name in enumerate(["a/b", "", "ttl", "ü", "x" * 300]):
            failure = await client.failure(await client.submit(run, n + 1, SaveCommand("weights", name)))
            assert failure.category == "user"
        saved = await client.do(run, 6, SaveCommand("weights", None))
        assert saved["path"] == f"tinker://{run}/weights/checkpoint-000006"


@virtual
async def test_overwriting_replaces_the_record_wholly(tmp_path):
    async with control_plane(tmp_path) as plane:
        client = await Client(plane).open()
        run = await client.create()
        await client.do(run, 1, SaveCommand("weights", "n", user_metadata={"step": "1", "old": "x"}))
        await client.do(run, 2, pass_command("a"))
        await asyncio.sleep(5)
        path = (await client.do(run, 3, SaveCommand("weights", "n", 7200, True, {"step": "2"})))["path"]
        (view,), total = await plane.list_checkpoints(TENANT, run, None, 0)
        assert total == 1
        assert view["user_metadata"] == {"step": "2"}
        assert view["expires_at"].endswith("Z")
        sampler = await plane.create_sampler(TENANT, client.session, 0, None, path)
        assert await client.result(await client.sample(sampler)) == ("create", "a")


@virtual
async def test_a_load_waits_for_the_save_that_it_reads(tmp_path):
    group = EchoGroup()
    group.delay_saves = 5
    async with control_plane(tmp_path, group) as plane:
        client = await Client(plane).open()
        run = await client.create()
        save = await client.submit(run, 1, SaveCommand("weights", "n"))
        load = await client.submit(run, 2, LoadCommand(f"tinker://{run}/weights/n", True))
        assert (await client.result(load))["model_id"] == run
        assert (await client.result(save))["path"] == f"tinker://{run}/weights/n"


@virtual
async def test_a_ttl_is_checked_kept_and_lifted(tmp_path):
    async with control_plane(tmp_path) as plane:
        client = await Client(plane).open()
        run = await client.create()
        failure = await client.failure(await client.submit(run, 1, SaveCommand("weights", "n", 60)))
        assert "ttl_seconds 60 is not between 3600" in failure.message
        short = (await client.do(run, 2, SaveCommand("weights", "short", 3600)))["path"]
        long = (await client.do(run, 3, SaveCommand("weights", "long", 3600)))["path"]
        with pytest.raises(Invalid, match="ttl_seconds"):
            await plane.set_checkpoint_ttl(TENANT, long, 5)
        await plane.set_checkpoint_ttl(TENANT, long, None)
        await asyncio.sleep(3700)
        with pytest.raises(NotFound):
            await plane.weights_info(TENANT, short)
        await plane.weights_info(TENANT, long)


@virtual
async def test_listings_are_newest_first_in_pages(tmp_path):
    async with control_plane(tmp_path) as plane:
        client = await Client(plane).open()
        runs = [await client.create(n) for n in range(3)]
        for n, run in enumerate(runs):
            await client.do(run, 1, SaveCommand("weights", f"n{n}"))
            await client.do(run, 2, SaveCommand("sampler_weights", f"n{n}"))
        page, total = await plane.list_runs(TENANT, 2, 1)
        assert [view["training_run_id"] for view in page] == runs[1::-1]
        assert total == 3
        assert page[0]["last_checkpoint"]["checkpoint_id"] == "weights/n1"
        assert page[0]["last_sampler_checkpoint"]["checkpoint_type"] == "sampler"
        views, total = await plane.list_checkpoints(TENANT, None, 3, 0)
        assert [view["checkpoint_id"] for view in views] == [
            "sampler_weights/n2",
            "weights/n2",
            "sampler_weights/n1",
        ]
        assert total == 6
