"""Limits of tenants: who is over one waits and is told why, and nothing that was accepted fails for it."""

from __future__ import annotations

import asyncio
import itertools
from pathlib import Path
from typing import Any

import pytest

from tests.control.echo_group import EchoGroup, pass_command
from tests.control.plane import Client, control_plane, make_config, optim
from tests.control.virtual_time import virtual
from twinkle_serve.config import Config, LimitsConfig, TenantLimits
from twinkle_serve.control.backend import Poll, SaveCommand, UnloadCommand
from twinkle_serve.protocol.errors import CAPACITY, RATE, Busy


def limited(**limits: Any) -> Config:
    return make_config().model_copy(update={"limits": LimitsConfig.model_validate({"tenant": limits})})


async def look(client: Client, request_id: str) -> Poll:
    return await client.plane.poll(client.tenant, request_id, 0.5)


@virtual
async def test_passes_wait_for_the_rate_and_are_told_so(tmp_path: Path) -> None:
    config = limited(tokens_per_s=10, token_burst_s=10)
    async with control_plane(tmp_path, config=config) as plane:
        client = await Client(plane).open()
        run = await client.create()
        first = await client.submit(run, 1, pass_command("a", 200))
        second = await client.submit(run, 2, pass_command("b", 10))
        third = await client.submit(run, 3, optim())
        assert await client.result(first) == ("create", "a")
        for request in (second, third):
            poll = await look(client, request)
            assert (poll.state, poll.queue_state) == ("pending", RATE)
            assert "10 tokens a second" in (poll.queue_reason or "")
        began = asyncio.get_running_loop().time()
        assert await client.result(second) == ("create", "a", "b")
        assert asyncio.get_running_loop().time() - began == pytest.approx(9, abs=0.5)
        assert (await client.result(third))["history"][-1] == "optim 1"


@virtual
async def test_one_tenants_rate_is_not_anothers(tmp_path: Path) -> None:
    async with control_plane(tmp_path, config=limited(tokens_per_s=10, token_burst_s=1)) as plane:
        fast, calm = await Client(plane, "fast").open(), await Client(plane, "calm").open()
        run, other = await fast.create(), await calm.create()
        await fast.do(run, 1, pass_command("a", 500))
        throttled = await fast.submit(run, 2, pass_command("b"))
        began = asyncio.get_running_loop().time()
        await calm.do(other, 1, pass_command("c"))
        assert asyncio.get_running_loop().time() - began < 1
        assert (await look(fast, throttled)).queue_state == RATE


@virtual
async def test_samples_wait_for_the_rate_too(tmp_path: Path) -> None:
    async with control_plane(tmp_path, config=limited(tokens_per_s=1, token_burst_s=1)) as plane:
        client = await Client(plane).open()
        sampler = await plane.create_sampler(client.tenant, client.session, 0, "base", None)
        requests = [await client.sample(sampler, n) for n in range(3)]
        assert await client.result(requests[0]) == ()
        poll = await look(client, requests[1])
        assert (poll.state, poll.queue_state) == ("pending", RATE)
        for request in requests[1:]:
            assert await client.result(request) == ()


@virtual
async def test_the_loop_rests_while_everybody_waits(tmp_path: Path) -> None:
    group = EchoGroup()
    async with control_plane(tmp_path, group, limited(tokens_per_s=1, token_burst_s=1, live_runs=1)) as plane:
        client = await Client(plane).open()
        run = await client.create()
        await client.do(run, 1, pass_command("a", 1000))
        sampler = await plane.create_sampler(client.tenant, client.session, 9, "base", None)
        sample = await client.sample(sampler, 0)
        pending = await client.submit(run, 2, pass_command("b"))
        await plane.cancel(client.tenant, sample)
        steps = itertools.count()
        plan = plane._drivers["base"].planner.next
        plane._drivers["base"].planner.next = lambda now: (next(steps), plan(now))[1]  # type: ignore[method-assign]
        await client.result(pending)
        assert next(steps) < 400, "a thousand seconds are no reason to look more often than the sweep"


@virtual
async def test_further_runs_wait_for_earlier_ones_to_end_in_order(tmp_path: Path) -> None:
    async with control_plane(tmp_path, config=limited(live_runs=2)) as plane:
        client = await Client(plane).open()
        other = await Client(plane).open()
        runs = [await client.create(0), await other.create(0)]
        waiting = [
            await plane.create_model(client.tenant, client.session, n, "base", spec, {})
            for n, spec in ((1, (await plane.run_info(client.tenant, runs[0])).spec),) * 1
        ]
        waiting.append(
            await plane.create_model_from(
                client.tenant,
                client.session,
                2,
                (await client.do(runs[0], 1, SaveCommand("weights", "n")))["path"],
                False,
                None,
                {},
            )
        )
        stranger = await Client(plane, "stranger").open()
        await stranger.create()
        for request in waiting:
            poll = await look(client, request)
            assert (poll.state, poll.queue_state) == ("pending", CAPACITY)
            assert "2 runs" in (poll.queue_reason or "")
        await client.do(runs[0], 2, UnloadCommand())
        assert (await client.result(waiting[0]))["model_id"].endswith(":1")
        assert (await look(client, waiting[1])).state == "pending"
        await plane.finish_session(client.tenant, other.session, {"type": "success"})
        assert (await client.result(waiting[1]))["model_id"].endswith(":2")


@virtual
async def test_a_plan_looks_at_each_run_once_however_many_wait(tmp_path: Path) -> None:
    async with control_plane(tmp_path, config=limited(live_runs=20)) as plane:
        client = await Client(plane).open()
        for number in range(20):
            await client.create(number)
        spec = (await plane.run_info(client.tenant, f"{client.session}:train:0")).spec
        waiting = [
            await plane.create_model(client.tenant, client.session, number, "base", spec, {})
            for number in range(20, 100)
        ]
        await asyncio.sleep(1)
        plans, looks = itertools.count(), itertools.count()
        driver, sessions = plane._drivers["base"], plane._books.sessions
        plan, is_active = driver.planner.next, sessions.is_active
        driver.planner.next = lambda now: (next(plans), plan(now))[1]  # type: ignore[method-assign]
        sessions.is_active = lambda session_id: (next(looks), is_active(session_id))[1]  # type: ignore[method-assign]
        driver.wake()
        await asyncio.sleep(0.1)
        assert 0 < next(looks) <= 100 * next(plans)
        await client.do(f"{client.session}:train:3", 1, UnloadCommand())
        await client.result(waiting[0])
        assert (await look(client, waiting[1])).state == "pending"


@virtual
async def test_a_save_without_room_waits_until_something_is_deleted(tmp_path: Path) -> None:
    config = limited()
    config.limits.tenant.checkpoint_bytes = 150  # an EchoGroup says 101 and more
    async with control_plane(tmp_path, config=config) as plane:
        client = await Client(plane).open()
        run = await client.create()
        first = await client.do(run, 1, SaveCommand("weights", "one"))
        await client.do(run, 2, SaveCommand("weights", "two"))
        third = await client.submit(run, 3, SaveCommand("weights", "three"))
        behind = await client.submit(run, 4, pass_command("a"))
        for request in (third, behind):
            poll = await look(client, request)
            assert (poll.state, poll.queue_state) == ("pending", CAPACITY)
            assert "150 bytes" in (poll.queue_reason or "")
        with pytest.raises(Busy, match="150 bytes"):
            plane._books.quotas.check_checkpoints(client.tenant)
        plane._books.quotas.check_checkpoints("stranger")
        await plane.delete_checkpoint(client.tenant, first["path"])
        assert (await client.result(third))["path"].endswith("/three")
        await client.result(behind)


@virtual
async def test_what_is_too_much_is_not_accepted_and_spends_no_seq_id(tmp_path: Path) -> None:
    async with control_plane(tmp_path, config=limited(pending_requests=3)) as plane:
        client = await Client(plane).open()
        run = await client.create()
        parked = [await client.submit(run, n, pass_command(str(n))) for n in (2, 3)]
        await client.submit(run, 4, optim())
        with pytest.raises(Busy, match="3 of your requests"):
            await client.submit(run, 5, pass_command("x"))
        assert await client.submit(run, 3, pass_command("3")) == parked[1], "a duplicate is known"
        sampler = await plane.create_sampler(client.tenant, client.session, 0, "base", None)
        with pytest.raises(Busy):
            await client.sample(sampler, 0)
        with pytest.raises(Busy):
            await client.create(1)
        stranger = await Client(plane, "stranger").open()
        await stranger.create()
        first = await client.submit(run, 1, pass_command("1"))  # the others wait for it
        assert await client.result(first) == ("create", "1")
        assert await client.result(parked[1]) == ("create", "1", "2", "3")
        assert await client.result(await client.sample(sampler, 0)) == ()


@virtual
async def test_bytes_that_wait_are_limited_but_one_request_always_goes(tmp_path: Path) -> None:
    config = limited()
    config.limits.tenant.pending_bytes = 40
    async with control_plane(tmp_path, config=config) as plane:
        client = await Client(plane).open()
        run = await client.create()
        await client.submit(run, 2, pass_command("x" * 100))
        with pytest.raises(Busy, match="above 40"):
            await client.submit(run, 4, pass_command("a"))
        await client.submit(run, 3, optim())
        assert plane._books.promises.pending_of(client.tenant).num_bytes > 100
        await client.do(run, 1, pass_command("a"))
        await client.do(run, 4, pass_command("a"))
        assert plane._books.promises.pending_of(client.tenant).num_bytes == 0


@virtual
async def test_samples_that_wait_for_memory_are_not_accepted_and_may_come_again(tmp_path: Path) -> None:
    """Their prompts are what they hold; the same seq_id is good for the next try."""
    config = limited()
    config.limits.tenant.pending_bytes = 20
    async with control_plane(tmp_path, config=config) as plane:
        client = await Client(plane).open()
        sampler = await plane.create_sampler(client.tenant, client.session, 0, "base", None)
        first = [await client.sample(sampler, number, max_tokens=50) for number in range(2)]
        assert plane._books.promises.pending_of(client.tenant).num_bytes == 16
        with pytest.raises(Busy, match="above 20"):
            await client.sample(sampler, 2)
        await client.result(first[0])
        assert await client.result(await client.sample(sampler, 2)) == ()
        await client.result(first[1])
        assert plane._books.promises.pending_of(client.tenant).num_bytes == 0


def test_a_tenant_is_found_by_id_and_by_name(tmp_path: Path) -> None:
    tree = {"tenant": {"live_runs": 3}, "tenants": {"alice": {"weight": 2}, "ms-1": {"live_runs": 5}}}
    limits = LimitsConfig.model_validate(tree)
    assert limits.tenants["alice"].live_runs == 3, "what is not said is as for all"
    assert limits.of("key-7", "alice").weight == 2
    assert limits.of("ms-1", "bob").live_runs == 5
    assert limits.of("key-8", "carol") == limits.tenant
    assert LimitsConfig.model_validate(limits.model_dump()) == limits


@virtual
async def test_the_planner_weighs_as_configured(tmp_path: Path) -> None:
    limits = LimitsConfig.model_validate({"tenants": {"gold": {"weight": 3.0}}})
    config = make_config().model_copy(update={"limits": limits})
    names = {"key-1": "gold"}
    async with control_plane(tmp_path, config=config, name_of=lambda t: names.get(t, t)) as plane:
        for tenant, weight in (("key-1", 3.0), ("key-2", 1.0)):
            client = await Client(plane, tenant).open()
            await client.create()
            assert plane._drivers["base"].planner._tenants[tenant].weight == weight


@virtual
async def test_who_has_too_many_active_sessions_waits_until_some_end(tmp_path):
    limits = make_config().limits.model_copy(update={"tenant": TenantLimits(sessions=2)})
    config = make_config().model_copy(update={"limits": limits})
    async with control_plane(tmp_path, config=config) as plane:
        first = await plane.create_session("alice", {})
        await plane.create_session("alice", {})
        with pytest.raises(Busy, match=r"limits\.tenant\.sessions"):
            await plane.create_session("alice", {})
        await plane.create_session("bob", {})
        await plane.finish_session("alice", first, {})
        await plane.create_session("alice", {})
