"""The sweep goes on, whatever one of its steps meets."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from unittest.mock import patch

import pytest

from tests.control.echo_group import EchoGroup, pass_command
from tests.control.memory_journal import MemoryFiles
from tests.control.plane import TENANT, Client, control_plane
from tests.control.test_keeper import Store, again
from tests.control.virtual_time import VirtualClock, virtual
from twinkle_serve.config import Config
from twinkle_serve.control.backend import SaveCommand
from twinkle_serve.control.durability import Durability
from twinkle_serve.control.service import ControlPlane
from twinkle_serve.storage.catalog import Catalog
from twinkle_serve.storage.ledger import Ledger

STEPS = {"delete_checkpoint", "add", "put_session"}


def status(plane: ControlPlane, client: Client) -> str:
    return plane._books.sessions.get(TENANT, client.session).record.status


def full(*args: object) -> None:
    raise OSError("No space left on device")


@asynccontextmanager
async def another_model(store: Store):
    """A later life of the server, which serves "other" and no longer "base"."""
    config = Config.model_validate({"models": [{"name": "other", "path": "nowhere"}]})
    plane = ControlPlane(
        {"other": EchoGroup("other")},
        store.catalog,  # type: ignore[arg-type]
        config.model_copy(update={"limits": store.config.limits}),
        VirtualClock(),
        new_token=store.token,
        durability=Durability(store.journal.opened(), MemoryFiles(store.files)),
    )
    await plane.start()
    try:
        yield plane
    finally:
        await plane.close()


async def a_trained_run(store: Store) -> Client:
    async with store.opened() as plane:
        client = await Client(plane).open()
        await client.do(await client.create(), 1, pass_command("a"))
        return client


@virtual
async def test_a_run_whose_model_is_served_no_more_does_not_end_the_sweeping():
    store = Store()
    client = await a_trained_run(store)
    async with another_model(store) as plane:
        await asyncio.sleep(700)
        assert status(plane, client) == "expired"
        later = await Client(plane).open()
        await asyncio.sleep(700)
        assert status(plane, later) == "expired"


@virtual
async def test_a_session_with_a_run_whose_model_is_served_no_more_can_be_finished():
    store = Store()
    client = await a_trained_run(store)
    async with another_model(store) as plane:
        await plane.finish_session(TENANT, client.session, {"type": "success"})
        assert status(plane, again(client, plane)) == "finished"


@virtual
async def test_a_coordinator_that_another_has_replaced_deletes_nothing_when_it_wakes_up():
    store = Store()
    async with store.opened() as old:
        client = await Client(old).open()
        run = await client.create()
        path = (await client.do(run, 1, SaveCommand("weights", "n", ttl_seconds=3600)))["path"]
        old._sweep_timer.cancel()  # it stands still
        async with store.opened() as new:
            await new.set_checkpoint_ttl(TENANT, path, None)
            for _ in range(10):
                await asyncio.sleep(500)
                await new.heartbeat(TENANT, client.session)
            old._sweep()
            await asyncio.sleep(60)
            assert store.fenced == 1
            (listed,) = store.catalog.load_all().checkpoints
            assert listed.expires_at is None
            assert [session.status for session in store.catalog.load_all().sessions] == ["active"]
            assert old._sweep_timer.cancelled(), "it sweeps no more"


@virtual
async def test_while_the_journal_cannot_be_written_the_sweep_goes_on_for_it_makes_room():
    store = Store()
    async with store.opened() as plane:
        client = await Client(plane).open()
        run = await client.create()
        await client.do(run, 1, SaveCommand("weights", "n", ttl_seconds=3600))
        never = asyncio.get_running_loop().create_future
        with patch.object(store.journal, "flush", never):
            await asyncio.sleep(3700)
            assert not plane._books.checkpoints.of_run(run)


@virtual
async def test_a_sweep_that_waits_when_the_server_closes_is_not_done():
    store = Store()
    async with store.opened() as plane:
        client = await Client(plane).open()
        await asyncio.sleep(590)
        plane._sweep_timer.cancel()
        await asyncio.sleep(20)  # the session is to expire in the sweep that begins now
        plane._sweep()
    await asyncio.sleep(60)
    assert status(plane, client) == "active"
    assert plane._sweep_timer.cancelled()


@virtual
async def test_a_server_is_closed_to_the_end_on_a_full_disk(tmp_path, caplog):
    ledger = Ledger(tmp_path)
    async with control_plane(tmp_path, ledger=ledger) as plane:
        client = await Client(plane).open()
        run = await client.create()
        await client.do(run, 1, pass_command("a"))
        parked = await client.submit(run, 3, pass_command("b"))
        with patch.object(ledger, "add", full):
            await plane.close()
        assert "shutting down" in (await client.failure(parked)).message
    assert "No space left" in caplog.text
    ledger.close()


@pytest.mark.parametrize("broken", sorted(STEPS))
def test_a_full_disk_holds_up_the_step_that_meets_it_and_only_while_it_is_full(tmp_path, broken, caplog):
    @virtual
    async def scenario():
        ledger, catalog = Ledger(tmp_path), Catalog(tmp_path, "sqlite://")
        async with control_plane(tmp_path, catalog=catalog, ledger=ledger) as plane:
            client = await Client(plane).open()
            run = await client.create()
            await client.do(run, 1, pass_command("a", 10))
            await client.do(run, 2, SaveCommand("weights", "n", ttl_seconds=3600))

            def trained() -> list[float]:
                lines = ledger.usage(TENANT, 0, 1e12)
                return [amount for key, amount in lines if key.kind == "training"]

            def done() -> set[str]:
                found = {
                    "delete_checkpoint": not plane._books.checkpoints.of_run(run),
                    "add": bool(trained()),
                    "put_session": status(plane, client) == "expired",
                }
                return {step for step, is_done in found.items() if is_done}

            breaking = {
                "delete_checkpoint": patch.object(catalog, "delete_checkpoint", full),
                "add": patch.object(ledger, "add", full),
                "put_session": patch.object(plane._books.sessions, "_save", full),
            }
            with breaking[broken]:
                await asyncio.sleep(2 * 3600)
                assert done() == STEPS - {broken}
            assert "No space left" in caplog.text
            await asyncio.sleep(120)
            assert done() == STEPS
            assert trained() == [10], "nothing that was counted is lost, or counted twice"
        ledger.close()

    scenario()
