from __future__ import annotations

import asyncio
import random
from pathlib import Path
from unittest.mock import patch

import pytest

from tests.control.echo_group import EchoGroup, pass_command
from tests.control.memory_catalog import MemoryCatalog
from tests.control.memory_journal import MemoryFiles, MemoryJournal
from tests.control.plane import TENANT, Client, control_plane, make_config, optim, prompt
from tests.control.virtual_time import EPOCH, VirtualClock, virtual
from twinkle_serve.config import TenantLimits
from twinkle_serve.control.backend import SaveCommand
from twinkle_serve.control.durability import Durability
from twinkle_serve.control.metrics import Tally
from twinkle_serve.control.service import ControlPlane
from twinkle_serve.control.usage import MAX_SHOWN
from twinkle_serve.protocol.data import SampleDelta
from twinkle_serve.storage.ledger import Event, Ledger


@virtual
async def test_tokens_saves_and_storage_are_counted_by_the_hour(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    start = EPOCH // 3600 * 3600
    async with control_plane(tmp_path, ledger=ledger) as plane:
        client = await Client(plane).open()
        run = await client.create()
        await client.do(run, 1, pass_command("a", 10, 20))
        await client.do(run, 2, pass_command("b", 5, backward=False))
        await client.do(run, 3, SaveCommand("weights", "n"))
        sampler = await plane.create_sampler(client.tenant, client.session, 0, "base", None)
        await client.result(await client.sample(sampler))
        await asyncio.sleep(2 * 3600)
        await plane.delete_checkpoint(client.tenant, f"tinker://{run}/weights/n")
        bill = await plane.bill(client.tenant, start, start + 6 * 3600)
        again = await plane.bill(client.tenant, start, start + 6 * 3600)
    amounts: dict[str, float] = {}
    for line in bill["data"]:
        info = line["event_info"]
        amount = info.get("token_count", info.get("count", info.get("gigabyte_hours")))
        amounts[info["type"]] = amounts.get(info["type"], 0) + amount
    assert amounts["training"] == 35
    assert amounts["checkpoint"] == 1
    assert amounts["sampling_prefill"] == 2
    size = 100 + len(("create", "a"))  # what an EchoGroup says
    assert amounts["storage"] == pytest.approx(2 * size / 1e9, rel=0.02)
    assert len([line for line in bill["data"] if line["event_info"]["type"] == "storage"]) >= 2
    assert again["data"] == bill["data"], "asking changes nothing"
    ledger.close()


@virtual
async def test_a_bill_names_base_models_not_their_groups(tmp_path: Path) -> None:
    config, ledger = make_config(), Ledger(tmp_path)
    model = config.models[0].model_copy(update={"groups": 2})
    config = config.model_copy(update={"models": [model]})
    groups = {"base": EchoGroup(), "base#2": EchoGroup()}
    plane = ControlPlane(groups, MemoryCatalog(), config, VirtualClock(), ledger=ledger)
    await plane.start()
    client = await Client(plane).open()
    for number in range(2):
        await client.do(await client.create(number), 1, pass_command("a"))
    assert [len(group.ticks) > 1 for group in groups.values()] == [True, True]
    bill = await plane.bill(client.tenant, EPOCH - 7200, EPOCH + 7200)
    assert [line["base_model"] for line in bill["data"]] == ["base"]
    assert bill["data"][0]["event_info"] == {"type": "training", "token_count": 20}
    await plane.close()
    ledger.close()


@virtual
async def test_a_sample_that_is_cancelled_or_left_counts_as_far_as_it_came(tmp_path: Path) -> None:
    config, ledger = make_config(), Ledger(tmp_path)
    tenant = TenantLimits(tokens_per_s=1.0, token_burst_s=60.0)
    config = config.model_copy(update={"limits": config.limits.model_copy(update={"tenant": tenant})})
    async with control_plane(tmp_path, config=config, ledger=ledger) as plane:
        request = await plane.sample_model(TENANT, "base", None, prompt(10_000), True)
        deltas: list[SampleDelta] = []
        while (seen := sum(len(delta.tokens) for delta in deltas)) < 100:
            deltas += (await plane.follow(TENANT, request, len(deltas), 30)).value
        await plane.cancel(TENANT, request)
        await asyncio.sleep(1)
        waits = await plane.sample_model(TENANT, "base", None, prompt(1), False)
        poll = await plane.poll(TENANT, waits, 2)
        assert (poll.state, poll.queue_state) == ("pending", "paused_rate_limit")
        await plane.cancel(TENANT, waits)
        client = await Client(plane).open()
        sampler = await plane.create_sampler(TENANT, client.session, 0, "base", None)
        await asyncio.sleep(300)
        await client.sample(sampler, 1, max_tokens=100_000)
        await asyncio.sleep(300)
        bill = await plane.bill(TENANT, EPOCH - 7200, EPOCH + 7200)
        amounts = {(b["event_info"]["type"], b.get("session_id", "")): b["event_info"] for b in bill["data"]}
        drawn = amounts["sampling_sample", ""]["token_count"]
        assert seen <= drawn < seen + 100
        left = amounts["sampling_sample", client.session]["token_count"]
        assert 100 / 0.01 < left < 140 / 0.01, "until nobody had asked for it for long enough"
        assert amounts["sampling_prefill", ""]["token_count"] == 2, "the one that waited was not read"
        assert plane.watch._cancelled == {}
    ledger.close()


@virtual
async def test_what_is_done_again_after_the_group_died_is_not_counted_again(tmp_path: Path) -> None:
    ledger, group, meter = Ledger(tmp_path), EchoGroup(), Tally()
    durability = Durability(MemoryJournal(random.Random(1)), MemoryFiles(group.files))
    deaths_left: list[bool] = []
    group.crash_when = lambda tick, phase: bool(
        phase == "passes"
        and any(b"look" in each.datums for each in tick.passes)
        and deaths_left
        and deaths_left.pop()
    )
    async with control_plane(tmp_path, group, durability=durability, ledger=ledger, meter=meter) as plane:
        client = await Client(plane).open()
        run = await client.create()
        await client.do(run, 1, pass_command("a", 1000))
        await client.do(run, 2, optim())
        for number in (3, 4):
            deaths_left.append(True)
            await client.do(run, number, pass_command(f"look{number}", 1, backward=False))
        assert group.rebuilds == 2
        bill = await plane.bill(TENANT, EPOCH - 7200, EPOCH + 7200)
        amounts = [line["event_info"].get("token_count", 0) for line in bill["data"]]
        assert sum(amounts) == 1002
        assert meter.total("optimizer_steps") == 1
    ledger.close()


@virtual
async def test_what_was_counted_outlives_the_server(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    async with control_plane(tmp_path, ledger=ledger) as plane:
        client = await Client(plane).open()
        await client.do(await client.create(), 1, pass_command("a", 10))
    async with control_plane(tmp_path, ledger=ledger) as plane:
        bill = await plane.bill(client.tenant, EPOCH - 7200, EPOCH + 7200)
    assert [line["event_info"] for line in bill["data"]] == [{"type": "training", "token_count": 10}]
    ledger.close()


def full(*args: object) -> None:
    raise OSError("No space left on device")


async def events(plane: ControlPlane) -> list[str]:
    return [event["event"] for event in await plane.audit(TENANT, "2023-11-14", "all")]


@virtual
async def test_an_audit_log_that_cannot_be_written_holds_up_nothing_and_lacks_nothing_later(tmp_path, caplog):
    ledger = Ledger(tmp_path)
    group = EchoGroup()
    group.on_disk = True
    async with control_plane(tmp_path, group, ledger=ledger) as plane:
        client = await Client(plane).open()
        run = await client.create()
        with patch.object(ledger, "note", full):
            path = (await client.do(run, 1, SaveCommand("weights", "n")))["path"]
            assert "manifest.json" in await plane.checkpoint_files(TENANT, path)
            await plane.publish_checkpoint(TENANT, path, True)
            await plane.delete_checkpoint(TENANT, path)
            await asyncio.sleep(10)
            assert ledger.events(TENANT, 0, 1e12) == []
        assert "No space left" in caplog.text
        await asyncio.sleep(120)
        happened = ["created", "read", "published", "deleted"]
        assert await events(plane) == [f"checkpoint_{event}" for event in happened]
        await client.do(run, 2, SaveCommand("weights", "n"))
        assert (await events(plane))[4:] == ["checkpoint_created"]
    ledger.close()


@virtual
async def test_events_that_could_not_be_written_are_at_the_end_of_a_life(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    async with control_plane(tmp_path, ledger=ledger) as plane:
        client = await Client(plane).open()
        with patch.object(ledger, "note", full):
            await client.do(await client.create(), 1, SaveCommand("weights", "n"))
    assert [event.event for event in ledger.events(TENANT, 0, 1e12)] == ["checkpoint_created"]
    ledger.close()


@virtual
async def test_reading_writes_nothing_but_a_line_an_hour_with_the_next_sweep(tmp_path: Path) -> None:
    ledger, group = Ledger(tmp_path), EchoGroup()
    group.on_disk = True
    async with control_plane(tmp_path, group, ledger=ledger) as plane:
        client = await Client(plane).open()
        path = (await client.do(await client.create(), 1, SaveCommand("weights", "n")))["path"]
        await plane.publish_checkpoint(TENANT, path, True)
        await asyncio.sleep(10)
        with patch.object(ledger, "note", full), patch.object(ledger, "add", full):
            for number in range(1000):
                await plane.checkpoint_files(f"stranger {number % 7}", path)
                await plane.checkpoint_files(TENANT, path)
            assert (await events(plane))[2:] == ["checkpoint_read"] * 2
            assert (await plane.bill(TENANT, EPOCH - 7200, EPOCH + 7200))["data"], "what is not written too"
        await asyncio.sleep(10)
        assert len(ledger.events(TENANT, 0, 1e12)) == 4
        await asyncio.sleep(7200)
        await plane.checkpoint_files("stranger 1", path)
        assert len(plane._books.usage._unnoted) == 1
    ledger.close()


@virtual
async def test_of_a_flood_of_events_the_newest_are_shown(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    ledger.note((TENANT, Event(EPOCH + at / 1e3, "checkpoint_read")) for at in range(MAX_SHOWN + 5))
    async with control_plane(tmp_path, ledger=ledger) as plane:
        found = await plane.audit(TENANT, None, "checkpoint_read")
        assert len(found) == MAX_SHOWN
        assert await plane.audit(TENANT, None, "checkpoint_created") == []
    ledger.close()
