"""Where a request stands, what a run is doing, and the operator's view of it all."""

from __future__ import annotations

import asyncio
import random
from pathlib import Path
from typing import Any

import pytest

from tests.control.echo_group import EchoGroup, pass_command
from tests.control.memory_journal import MemoryFiles, MemoryJournal
from tests.control.plane import TENANT, Client, control_plane, make_config, optim
from tests.control.virtual_time import run
from twinkle_serve.control.backend import NotFound
from twinkle_serve.control.durability import Durability
from twinkle_serve.control.insight import in_words
from twinkle_serve.control.metrics import METRICS, Tally, tenant_hash


@pytest.mark.parametrize(
    ("standing", "words"),
    [((3, 39.2), "position 3, ~40 s"), ((1, 0.01), "position 1, ~1 s"), ((2, None), "position 2")],
)
def test_a_position_in_words(standing: tuple[int, float | None], words: str) -> None:
    assert in_words(*standing) == words


async def look(plane: Any, tenant: str, request_id: str) -> Any:
    return await plane.poll(tenant, request_id, 0.0)


def test_a_request_that_waits_is_told_its_position_and_time(tmp_path: Path) -> None:
    async def program() -> list[Any]:
        # One slot and one pass a tick of 10 s: who comes later waits.
        group = EchoGroup(max_slots=1, pass_s=10.0)
        async with control_plane(tmp_path, group) as plane:
            clients = [await Client(plane, name).open() for name in ("a", "b", "c")]
            runs = [await client.create() for client in clients]
            await clients[0].do(runs[0], 1, pass_command("warm-up"))
            requests = []
            for client, run_id, number in zip(clients, runs, (2, 1, 1), strict=True):
                requests.append(await client.submit(run_id, number, pass_command("p")))
                await asyncio.sleep(0.1)
            polls = [await look(plane, c.tenant, r) for c, r in zip(clients, requests, strict=True)]
            for client, request in zip(clients, requests, strict=True):
                await client.result(request)
            return polls

    working, second, third = run(program())
    assert (working.queue_state, working.queue_reason) == ("active", None)
    assert second.queue_state == third.queue_state == "paused_capacity"
    assert {second.queue_reason, third.queue_reason} == {"position 1, ~11 s", "position 2, ~21 s"}


def test_a_request_behind_a_gap_says_what_is_missing(tmp_path: Path) -> None:
    async def program() -> tuple[Any, Any]:
        async with control_plane(tmp_path) as plane:
            client = await Client(plane).open()
            run_id = await client.create()
            request = await client.submit(run_id, 3, optim())
            return await look(plane, TENANT, request), await plane.run_insight(TENANT, run_id)

    poll, insight = run(program())
    assert poll.queue_reason == "waits for the run's request with seq_id 1, which has not arrived"
    assert insight["status"] == {"state": "gap", "missing": 1, "num_waiting": 1}


def test_samples_that_wait_are_told_their_position(tmp_path: Path) -> None:
    async def program() -> list[Any]:
        config = make_config()
        config.models[0].sampler.max_batch = 1  # two are taken in at once
        group = EchoGroup()
        group.decode_s = 1.0
        async with control_plane(tmp_path, group, config) as plane:
            client = await Client(plane).open()
            sampler = await plane.create_sampler(TENANT, client.session, 0, "base", None)
            requests = [await client.sample(sampler, max_tokens=5) for _ in range(4)]
            await asyncio.sleep(0.1)
            first = [await look(plane, TENANT, request) for request in requests]
            for request in requests[:2]:
                await client.poll(request)
            return [poll.queue_reason for poll in first]

    assert run(program()) == [None, None, "position 1", "position 2"]


def test_states_of_a_run(tmp_path: Path) -> None:
    async def program() -> list[str]:
        group = EchoGroup(max_slots=1, pass_s=5.0)
        states = []

        async with control_plane(tmp_path, group) as plane:

            async def note(run_id: str) -> None:
                states.append((await plane.run_insight(TENANT, run_id))["status"]["state"])

            client = await Client(plane).open()
            first = await client.create(0)
            await note(first)
            request = await client.submit(first, 1, pass_command("p"))
            await asyncio.sleep(1.0)
            await note(first)
            await client.result(request)
            await client.create(1)
            await note(first)
            return states

    assert run(program()) == ["idle", "working", "paged"]


def test_a_run_is_seen_by_its_tenant_only(tmp_path: Path) -> None:
    async def program() -> None:
        async with control_plane(tmp_path) as plane:
            client = await Client(plane).open()
            run_id = await client.create()
            for method, arguments in [
                ("run_insight", (run_id,)),
                ("report_metrics", (run_id, 1, {"reward": 1.0})),
                ("session_trace", (client.session,)),
            ]:
                with pytest.raises(NotFound):
                    await getattr(plane, method)("mallory", *arguments)

    run(program())


def test_the_operator_sees_shares_and_slots_but_no_names(tmp_path: Path) -> None:
    async def program() -> tuple[Any, list[str]]:
        async with control_plane(tmp_path) as plane:
            ids = []
            for tenant, tokens in (("alice", 30), ("bob", 10)):
                client = await Client(plane, tenant).open()
                ids += [client.session, await client.create()]
                await client.do(ids[-1], 1, pass_command("p", tokens))
            return await plane.cluster_view(), ids

    view, ids = run(program())
    (model,) = view["models"]
    assert model["healthy"] is True
    assert [share["share"] for share in model["shares"]] == [0.75, 0.25]
    assert [share["tenant"] for share in model["shares"]] == [tenant_hash("alice"), tenant_hash("bob")]
    assert {slot["run"] for slot in model["slots"]} == {tenant_hash("alice"), tenant_hash("bob")}
    assert view["sessions"] == 2
    for secret in ["alice", "bob", *ids]:
        assert secret not in str(view)


def test_every_gauge_of_the_control_plane_is_set(tmp_path: Path) -> None:
    async def program() -> Tally:
        tally = Tally()
        durability = Durability(MemoryJournal(random.Random(0)), MemoryFiles({}))
        async with control_plane(tmp_path, meter=tally, durability=durability) as plane:
            client = await Client(plane).open()
            await client.do(await client.create(), 1, pass_command("p"))
            await asyncio.sleep(1.0)
            plane.measure()
        return tally

    tally = run(program())
    elsewhere = {"mfu_ratio"}
    of_rank = (("kind", "experts"), ("model", "base"), ("rank", "0"))
    assert tally.values["rank_memory_bytes", of_rank] == 7.0
    of_engines = {"paged_disk_bytes", "snapshot_host_bytes", "kv_blocks_free", "kv_blocks"}
    gauges = {metric.name for metric in METRICS if metric.kind == "gauge"}
    assert gauges - elsewhere - of_engines <= tally.names
    age = tally.values["snapshot_age_seconds", (("model", "base"),)]
    assert age >= 1.0
    assert tally.values["promises", (("state", "pending"),)] == 0
    assert tally.values["promises", (("state", "kept"),)] == 2
