from __future__ import annotations

import asyncio
from pathlib import Path
from unittest.mock import patch

import pytest

from tests.control.echo_group import EchoGroup, pass_command
from tests.control.memory_catalog import MemoryCatalog
from tests.control.plane import TENANT, Client, control_plane, make_config
from tests.control.virtual_time import EPOCH, VirtualClock, virtual
from twinkle_serve.control.backend import SaveCommand
from twinkle_serve.control.service import ControlPlane
from twinkle_serve.storage.ledger import Ledger


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
            assert await events(plane) == []
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
