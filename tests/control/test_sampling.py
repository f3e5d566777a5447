"""Samples as they grow, and what becomes of those that nobody wants any more."""

from __future__ import annotations

import asyncio
import random

import pytest

from tests.control.echo_group import EchoGroup
from tests.control.plane import TENANT, Client, control_plane, make_config, prompt
from tests.control.virtual_time import virtual
from twinkle_serve.control.backend import Invalid, NotFound, SaveCommand, SnapshotCommand
from twinkle_serve.control.service import ControlPlane


async def follow(plane: ControlPlane, request_id: str) -> list[int]:
    """How many tokens each answer of a stream brought."""
    counts, seen = [], 0
    while True:
        poll = await plane.follow(TENANT, request_id, seen, 30)
        if poll.state == "done":
            return counts
        seen += len(poll.value)
        counts.append(sum(len(delta.tokens) for delta in poll.value))


@virtual
async def test_a_streamed_sample_is_told_as_it_grows(tmp_path):
    async with control_plane(tmp_path) as plane:
        streamed = await plane.sample_model(TENANT, "base", None, prompt(500), True)
        counts = await follow(plane, streamed)
        assert sum(counts) <= 500
        assert len(counts) > 5
        assert await Client(plane).result(streamed) == ()
        whole = await plane.sample_model(TENANT, "base", None, prompt(500), False)
        assert await follow(plane, whole) == []


@virtual
async def test_what_was_told_before_can_be_asked_for_again(tmp_path):
    async with control_plane(tmp_path) as plane:
        request = await plane.sample_model(TENANT, "base", None, prompt(500), True)
        first = await plane.follow(TENANT, request, 0, 30)
        await plane.follow(TENANT, request, len(first.value), 30)
        again = await plane.follow(TENANT, request, 0, 30)
        assert again.value[: len(first.value)] == first.value
        assert len(again.value) > len(first.value)
        assert (await plane.follow("bob", request, 0, 30)).state == "gone"


@virtual
async def test_models_and_checkpoints_are_sampled_without_a_session(tmp_path):
    async with control_plane(tmp_path) as plane:
        client = await Client(plane).open()
        run = await client.create()
        path = (await client.do(run, 1, SaveCommand("sampler_weights", "n")))["path"]
        request = await plane.sample_model(TENANT, None, path, prompt(3), False)
        assert await client.result(request) == ("create",)
        with pytest.raises(NotFound):
            await plane.sample_model("bob", None, path, prompt(3), False)
        with pytest.raises(NotFound, match="huge"):
            await plane.sample_model(TENANT, "huge", None, prompt(3), False)
        with pytest.raises(Invalid):
            await plane.sample_model(TENANT, None, None, prompt(3), False)
        with pytest.raises(Invalid, match="257"):
            await plane.sample_model(TENANT, "base", None, prompt(1, 257), False)
        request = await plane.sample_model(TENANT, "base", None, prompt(10_000), False)
        await plane.cancel(TENANT, request)
        assert (await client.failure(request)).message == "cancelled"


@virtual
async def test_samples_that_nobody_asked_for_are_forgotten_in_the_end(tmp_path):
    async with control_plane(tmp_path) as plane:
        client = await Client(plane).open()
        sampler = await plane.create_sampler(TENANT, client.session, 0, "base", None)
        lost = await client.sample(sampler, 1, max_tokens=100_000)
        remembered = plane._books.samplers.get(TENANT, sampler).requests
        await asyncio.sleep(300)
        assert (await client.poll(lost)).state == "gone"
        assert list(remembered) == [1], "its client may ask what became of it"
        await asyncio.sleep(1900)
        assert remembered == {}


@virtual
async def test_a_sample_that_is_polled_now_and_then_lives_on(tmp_path):
    async with control_plane(tmp_path) as plane:
        client = await Client(plane).open()
        sampler = await plane.create_sampler(TENANT, client.session, 0, "base", None)
        held = await client.sample(sampler, max_tokens=100_000)  # 1,000 s
        waiting = asyncio.create_task(client.poll(held))
        glanced = await client.sample(sampler, max_tokens=100_000)
        for _ in range(9):
            await asyncio.sleep(110)
            await plane.heartbeat(TENANT, client.session)
            assert (await plane.poll(TENANT, glanced, 0)).state == "pending"
        assert (await waiting).value == ()
        assert await client.result(glanced) == ()


@virtual
async def test_a_stranger_does_not_keep_a_sample_alive(tmp_path):
    group = EchoGroup()
    async with control_plane(tmp_path, group) as plane:
        client = await Client(plane).open()
        sampler = await plane.create_sampler(TENANT, client.session, 0, "base", None)
        await client.sample(sampler, 0, max_tokens=100_000)
        for _ in range(13):
            await asyncio.sleep(10)
            for request_id in group.active:
                await plane.poll("bob", request_id, 0)
        assert not group.active


@virtual
async def test_a_client_that_was_only_asleep_submits_again(tmp_path):
    group = EchoGroup()
    async with control_plane(tmp_path, group) as plane:
        client = await Client(plane).open()
        sampler = await plane.create_sampler(TENANT, client.session, 0, "base", None)
        request = await client.sample(sampler, 0, max_tokens=100_000)
        await asyncio.sleep(119)
        assert group.active
        await asyncio.sleep(7)
        assert not group.active
        assert (await plane.poll(TENANT, request, 30)).state == "gone"
        assert await client.result(await client.sample(sampler, 1)) == ()


@virtual
async def test_the_samples_of_a_session_end_with_it(tmp_path):
    group = EchoGroup()
    async with control_plane(tmp_path, group) as plane:
        clients = [await Client(plane).open() for _ in range(2)]
        requests = []
        for client in clients:
            sampler = await plane.create_sampler(TENANT, client.session, 0, "base", None)
            requests.append(await client.sample(sampler, max_tokens=100_000))
        await asyncio.sleep(1)
        await plane.finish_session(TENANT, clients[0].session, {"type": "success"})
        await asyncio.sleep(1)
        assert list(group.active) == requests[1:]
        # The other one goes silent; somebody keeps polling, but its session expires.
        for _ in range(22):
            await asyncio.sleep(26)
            assert (await plane.poll(TENANT, requests[1], 0)).state == "pending"
        await asyncio.sleep(40)
        assert not group.active


@virtual
async def test_a_thousand_disconnects_leave_nothing_behind(tmp_path):
    """Clients vanish wherever they are: queued, decoding, in a poll, from snapshots and checkpoints."""
    rng = random.Random(5)
    group = EchoGroup()
    async with control_plane(tmp_path, group, make_config()) as plane:
        client = await Client(plane).open()
        run = await client.create()
        path = (await client.do(run, 1, SaveCommand("sampler_weights", "n")))["path"]
        snapshot = (await client.do(run, 2, SnapshotCommand(0)))["sampling_session_id"]
        named = await plane.create_sampler(TENANT, client.session, 1, None, path)
        books = plane._books
        promises = len(books.promises)

        async def vanish(number: int) -> None:
            await asyncio.sleep(rng.random() * 20)
            if number % 3 == 0:
                request = await plane.sample_model(TENANT, None, path, prompt(20_000), True)
            else:
                sampler = snapshot if number % 3 == 1 else named
                request = await client.sample(sampler, number, max_tokens=20_000)
            if number % 2 == 0:
                poll = asyncio.create_task(plane.follow(TENANT, request, 0, 30))
                await asyncio.sleep(rng.random() * 5)
                poll.cancel()

        await asyncio.gather(*(vanish(number) for number in range(1_000)))
        assert len(group.active) > 100
        await plane.heartbeat(TENANT, client.session)
        await asyncio.sleep(160)
        assert group.active == {}
        assert len(plane._sampling) == 0
        assert len(books.promises) == promises
        assert books.promises.num_pending == 0
        assert all(books.samplers.get(TENANT, s).num_in_flight == 0 for s in (snapshot, named))
        assert not books.checkpoints._pins
        driver = plane._drivers["base"]
        assert (len(driver._flights), driver.num_sequences) == (0, 0)
        ticks = len(group.ticks)
        await asyncio.sleep(10)
        assert len(group.ticks) == ticks
        assert await client.result(await client.sample(snapshot, 5_000)) == ("create",)
