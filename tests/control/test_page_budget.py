"""New runs wait when the room for paged adapters is used up, and start when there is room again."""

from __future__ import annotations

import asyncio

from tests.control.echo_group import EchoGroup
from tests.control.plane import Client, control_plane, make_config, optim
from tests.control.virtual_time import run
from twinkle_serve.config import Config
from twinkle_serve.control.backend import UnloadCommand
from twinkle_serve.protocol.data import LoraSpec


def small_pages() -> Config:
    config = make_config()
    model = config.models[0].model_copy(update={"host_page_bytes": 10, "disk_page_bytes": 15})
    return config.model_copy(update={"models": [model]})


def test_a_new_run_waits_for_room_and_says_so(tmp_path):
    async def scenario() -> None:
        group = EchoGroup(max_slots=2)
        group.bytes_per_page = 10
        async with control_plane(tmp_path, group, small_pages()) as plane:
            client = await Client(plane).open()
            runs = [await client.create(number) for number in range(5)]
            assert plane.gauges()["base"]["paged_host_bytes"] == 30
            waiting = await plane.create_model(client.tenant, client.session, 5, "base", LoraSpec(8), {})
            await asyncio.sleep(60)
            poll = await plane.poll(client.tenant, waiting, 0.0)
            assert poll.state == "pending"
            assert poll.queue_state == "paused_capacity"
            assert "full" in (poll.queue_reason or "")
            await client.do(runs[0], 1, UnloadCommand())
            assert (await client.result(waiting))["model_id"].endswith(":train:5")

    run(scenario())


def test_the_budget_is_that_of_each_rank(tmp_path):
    async def scenario() -> None:
        group = EchoGroup(max_slots=2)
        group.bytes_per_page = 20  # 10 on each of two ranks
        config = small_pages()
        models = [config.models[0].model_copy(update={"ranks": 2})]
        async with control_plane(tmp_path, group, config.model_copy(update={"models": models})) as plane:
            client = await Client(plane).open()
            for number in range(5):
                await client.create(number)
            waiting = await plane.create_model(client.tenant, client.session, 5, "base", LoraSpec(8), {})
            await asyncio.sleep(60)
            assert (await plane.poll(client.tenant, waiting, 0.0)).state == "pending"

    run(scenario())


def test_runs_that_exist_go_on_while_new_ones_wait(tmp_path):
    async def scenario() -> None:
        group = EchoGroup(max_slots=2)
        group.bytes_per_page = 30
        async with control_plane(tmp_path, group, small_pages()) as plane:
            client = await Client(plane).open()
            runs = [await client.create(number) for number in range(3)]
            waiting = await plane.create_model(client.tenant, client.session, 3, "base", LoraSpec(8), {})
            for run_id in runs:
                await client.do(run_id, 1, optim())
            poll = await plane.poll(client.tenant, waiting, 0.0)
            assert (poll.state, poll.queue_state) == ("pending", "paused_capacity")
            for run_id in runs:
                await client.do(run_id, 2, UnloadCommand())
            assert (await client.result(waiting))["model_id"].endswith(":train:3")

    run(scenario())
