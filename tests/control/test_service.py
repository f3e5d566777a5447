"""The control plane as a client sees it, over a group that echoes what was done to each run."""

from __future__ import annotations

import asyncio

import pytest

from tests.control.echo_group import EchoGroup, pass_command
from tests.control.plane import TENANT, Client, control_plane, make_config, optim, prompt
from tests.control.virtual_time import virtual
from twinkle_serve.control.backend import (
    Invalid,
    LoadCommand,
    NotFound,
    RejectedCommand,
    SaveCommand,
    SnapshotCommand,
    UnloadCommand,
)
from twinkle_serve.protocol.data import LoraSpec
from twinkle_serve.protocol.work import Failure


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
        assert await client.do(run, 6, pass_command("c", backward=False)) == (
            "create",
            "a",
            "optim 1",
            "load",
        )
        snapshot = await client.do(run, 7, SnapshotCommand(0))
        await client.do(run, 8, pass_command("d"))
        sampler = snapshot["sampling_session_id"]
        assert sampler == f"{client.session}:sample:0"
        assert await client.result(await client.sample(sampler, 0)) == ("create", "a", "optim 1", "load")
