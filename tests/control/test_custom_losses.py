"""Uploaded losses on record: tried once, kept for their owner, there again after a restart."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from tests.control.echo_group import EchoGroup
from tests.control.plane import TENANT, Client, control_plane
from twinkle_serve.control import custom_losses as module
from twinkle_serve.control.backend import Invalid, NotFound, PassCommand
from twinkle_serve.control.codec import decode_command, encode_command
from twinkle_serve.control.custom_losses import CustomLosses
from twinkle_serve.protocol.errors import BackendUnavailable
from twinkle_serve.protocol.work import Failure
from twinkle_serve.storage.records import LossRecord


async def test_a_loss_is_tried_once_and_then_known(tmp_path: Path) -> None:
    group = EchoGroup()
    async with control_plane(tmp_path, group) as plane:
        client = await Client(plane).open()
        both = await asyncio.gather(
            *(plane.create_custom_loss(TENANT, client.session, 0, "graph") for _ in range(2))
        )
        assert both[0] == both[1] == await plane.create_custom_loss(TENANT, client.session, 0, "graph")
        assert group.tried == ["graph"]
        loss_id = f"{client.session}:loss:0"
        assert await client.result(both[0]) == {"loss_id": loss_id}
        assert await plane.custom_loss(TENANT, loss_id) == "graph"
        with pytest.raises(NotFound, match="create_custom_loss"):
            await plane.custom_loss("bob", loss_id)
        with pytest.raises(NotFound):
            await plane.create_custom_loss("bob", client.session, 1, "graph")


async def test_one_is_tried_at_a_time(tmp_path: Path) -> None:
    """A tick that comes in between waits for one of them, not for all."""
    group = EchoGroup()
    async with control_plane(tmp_path, group) as plane:
        client = await Client(plane).open()
        graphs = ["graph", "bad graph", "lost graph", "graph", "graph"]
        answers = [plane.create_custom_loss(TENANT, client.session, *each) for each in enumerate(graphs)]
        results = await asyncio.gather(*answers, return_exceptions=True)
        assert [type(result) for result in results] == [str, str, BackendUnavailable, str, str]
        assert group.tried == graphs
        assert group.most_trying == 1


async def test_a_bad_loss_fails_and_leaves_nothing(tmp_path: Path) -> None:
    async with control_plane(tmp_path) as plane:
        client = await Client(plane).open()
        told = {"bad graph": "a bad loss", Failure("malformed"): "malformed"}
        for number, (graph, message) in enumerate(told.items()):
            request_id = await plane.create_custom_loss(TENANT, client.session, number, graph)
            assert (await client.failure(request_id)).message == message
            with pytest.raises(NotFound):
                await plane.custom_loss(TENANT, f"{client.session}:loss:{number}")


async def test_it_waits_for_a_rank(tmp_path: Path) -> None:
    """The SDK comes again with the same number."""
    async with control_plane(tmp_path) as plane:
        client = await Client(plane).open()
        with pytest.raises(BackendUnavailable, match="recovering"):
            await plane.create_custom_loss(TENANT, client.session, 0, "lost graph")
        request_id = await plane.create_custom_loss(TENANT, client.session, 0, "graph")
        assert "loss_id" in await client.result(request_id)


async def test_a_restart_remembers_it_and_its_answer(tmp_path: Path) -> None:
    async with control_plane(tmp_path, url=None) as plane:
        client = await Client(plane).open()
        request_id = await plane.create_custom_loss(TENANT, client.session, 3, "graph")
    group = EchoGroup()
    async with control_plane(tmp_path, group, url=None) as plane:
        client.plane = plane
        loss_id = f"{client.session}:loss:3"
        assert await client.result(request_id) == {"loss_id": loss_id}
        assert await plane.custom_loss(TENANT, loss_id) == "graph"
        assert await plane.create_custom_loss(TENANT, client.session, 3, "graph") == request_id
        assert group.tried == []


async def test_a_finished_session_takes_its_losses_along(tmp_path: Path) -> None:
    async with control_plane(tmp_path, url=None) as plane:
        client = await Client(plane).open()
        await plane.create_custom_loss(TENANT, client.session, 0, "graph")
        await plane.finish_session(TENANT, client.session, {})
        with pytest.raises(NotFound):
            await plane.custom_loss(TENANT, f"{client.session}:loss:0")
        with pytest.raises(Invalid, match="finished"):
            await plane.create_custom_loss(TENANT, client.session, 1, "graph")
    async with control_plane(tmp_path, url=None) as plane:
        with pytest.raises(NotFound):
            await plane.custom_loss(TENANT, f"{client.session}:loss:0")


def test_a_tenant_keeps_so_many(monkeypatch: pytest.MonkeyPatch) -> None:
    """The oldest of other sessions go first."""
    monkeypatch.setattr(module, "PER_TENANT", 3)
    saved: dict[str, LossRecord] = {}
    losses = CustomLosses(lambda record: saved.update({record.loss_id: record}), saved.pop)

    def add(loss_id: str, session: str, time: float, tenant: str = TENANT) -> None:
        losses.add(LossRecord(loss_id, session, tenant, time, "train-1", "graph"))

    for number in range(3):
        add(f"new{number}", "new", number)
    add("bob's", "bob", 0.0, "bob")
    add("old0", "old", 10.0)
    assert set(saved) == {"new1", "new2", "bob's", "old0"}
    add("new3", "new", 11.0)
    add("new4", "new", 12.0)
    assert set(saved) == {"new2", "new3", "new4", "bob's"}


def test_the_journal_has_the_whole_loss() -> None:
    """What is done again after a crash needs no record but its own."""
    command = PassCommand(b"datums", (3,), "custom", {"graph": '{"name":"mine \\u00e9"}'}, True)
    assert decode_command(encode_command(command)) == command
