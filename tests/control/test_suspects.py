"""Who is blamed when the group dies: nobody in company, and only who was there each time."""

from __future__ import annotations

import asyncio
import random
from typing import Any

from tests.control.echo_group import EchoGroup, pass_command
from tests.control.memory_journal import MemoryFiles, MemoryJournal
from tests.control.plane import TENANT, Client, control_plane, make_config
from tests.control.virtual_time import virtual
from twinkle_serve.config import TenantLimits
from twinkle_serve.control.durability import Durability
from twinkle_serve.control.suspects import Suspects


def test_one_death_or_two_blame_nobody():
    suspects = Suspects()
    assert suspects.died([("a1", "a"), ("b1", "b")]) is None
    assert not suspects.must_wait("a")
    assert not suspects.must_wait("b")
    assert suspects.died([("a1", "a"), ("b1", "b")]) is None
    assert not suspects.must_wait("a")
    assert suspects.must_wait("b")


def test_the_innocent_are_cleared_and_the_guilty_is_found():
    suspects = Suspects()
    for _ in range(2):
        suspects.died([("a1", "a"), ("b1", "b")])
    suspects.settled("a1")
    assert suspects.must_wait("a")
    assert suspects.died([("b1", "b")]) == "b1"
    assert not suspects.must_wait("a")


def test_deaths_in_changing_company_are_not_added_up():
    suspects = Suspects()
    for n in range(10):
        assert suspects.died([(f"a{n}", "a"), (f"b{n}", "b")]) is None
        suspects.settled(f"a{n}")
        suspects.settled(f"b{n}")
    assert not suspects.must_wait("a")


def test_a_trial_without_work_ends():
    suspects = Suspects()
    for _ in range(2):
        suspects.died([("a1", "a"), ("b1", "b")])
    assert suspects.must_wait("b")
    suspects.forgive()
    assert suspects.must_wait("a")
    suspects.forgive()
    assert not suspects.is_trying
    assert not suspects.must_wait("a")


def is_poisoned(tick: Any, phase: str) -> bool:
    return phase == "passes" and any(b"poison" in each.datums for each in tick.passes)


@virtual
async def test_a_request_that_kills_the_group_is_given_up_and_everybody_else_goes_on(tmp_path):
    group = EchoGroup(max_slots=2)
    group.crash_when = is_poisoned
    journal = MemoryJournal(random.Random(1))
    durability = Durability(journal, MemoryFiles(group.files))
    async with control_plane(tmp_path, group, durability=durability) as plane:
        client = await Client(plane).open()
        one, two = await client.create(0), await client.create(1)
        requests = [await client.submit(one, n, pass_command(f"a{n}")) for n in (1, 2)]
        requests.append(await client.submit(one, 3, pass_command("poison")))
        requests.append(await client.submit(one, 4, pass_command("a4")))
        other = [await client.submit(two, n, pass_command(f"b{n}")) for n in (1, 2)]
        assert "died each time" in (await client.failure(requests[2])).message
        assert await client.result(requests[3]) == ("create", "a1", "a2", "a4")
        assert await client.result(other[1]) == ("create", "b1", "b2")
        assert group.rebuilds >= 3
    assert any(entry.kind == "void" for entry in journal.rows[one].entries)
    assert client.tenant == TENANT


@virtual
async def test_a_deadly_request_above_its_tenants_rate_is_given_up_at_the_third_death_too(tmp_path):
    config = make_config()
    tenant = TenantLimits(tokens_per_s=100.0, token_burst_s=10.0)
    config = config.model_copy(update={"limits": config.limits.model_copy(update={"tenant": tenant})})
    group = EchoGroup(max_slots=2)
    group.crash_when = is_poisoned
    durability = Durability(MemoryJournal(random.Random(1)), MemoryFiles(group.files))
    async with control_plane(tmp_path, group, config, durability=durability) as plane:
        client, other = await Client(plane).open(), await Client(plane, "bob").open()
        one, two = await client.create(), await other.create()
        request = await client.submit(one, 1, pass_command("poison", 4000))
        poll = await plane.poll(TENANT, request, 3600)
        assert poll.failure is not None
        assert "died each time" in poll.failure.message
        assert await other.do(two, 1, pass_command("b1")) == ("create", "b1")
        assert group.rebuilds == 3
        waits = await client.submit(one, 2, pass_command("a2"))
        assert (await plane.poll(TENANT, waits, 1)).queue_state == "paused_rate_limit", (
            "the limit still holds"
        )
        await asyncio.sleep(600)
        assert await client.result(waits) == ("create", "a2")
