"""Several groups with one base model: a run lives in one of them, the least busy one at its birth."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.control.echo_group import EchoGroup, pass_command
from tests.control.memory_journal import MemoryFiles, MemoryJournal
from tests.control.plane import TENANT, Client, optim, prompt
from tests.control.virtual_time import VirtualClock, virtual
from twinkle_serve.config import Config
from twinkle_serve.control.backend import LoadCommand, NotFound, SaveCommand, SnapshotCommand, UnloadCommand
from twinkle_serve.control.durability import Durability
from twinkle_serve.control.groups import group_names
from twinkle_serve.control.service import ControlPlane
from twinkle_serve.protocol.data import LoraSpec
from twinkle_serve.protocol.errors import BackendUnavailable
from twinkle_serve.storage.catalog import Catalog

FIRST, SECOND = "base", "base#2"


class World:
    """A deployment with two groups of one model on one disk, which may be started again."""

    def __init__(self, root: Path, num_groups: int = 2) -> None:
        self.root = root
        self.num_groups = num_groups
        self.num_sampling = 0
        self.first_number = 1  # of the groups that are up at once; others come later
        self.on_disk = False
        self.groups: dict[str, EchoGroup] = {}
        self.files: dict[str, Any] = {}
        self.stored: dict[str, Any] = {}
        self.journal = MemoryJournal(random.Random(0))
        self.plane: ControlPlane

    def config(self, num_groups: int) -> Config:
        return Config.model_validate(
            {
                "models": [
                    {
                        "name": "base",
                        "path": "nowhere",
                        "groups": num_groups,
                        "sampling_groups": self.num_sampling,
                    }
                ],
                "storage": {"snapshot_every_steps": 1},
            }
        )

    def new_group(self) -> EchoGroup:
        group = EchoGroup(max_slots=4)
        group.files, group.stored, group.on_disk = self.files, self.stored, self.on_disk
        return group

    @asynccontextmanager
    async def up(self) -> AsyncIterator[Client]:
        config = self.config(self.num_groups)
        names = group_names(config.models[0])[self.first_number - 1 :]
        self.groups = {name: self.new_group() for name in names}
        self.journal = self.journal.opened()
        catalog = Catalog(self.root, None)
        durability = Durability(self.journal, MemoryFiles(self.files))
        self.plane = ControlPlane(self.groups, catalog, config, VirtualClock(), durability=durability)
        await self.plane.start()
        try:
            yield await Client(self.plane).open()
        finally:
            await self.plane.close()
            catalog.close()

    def home(self, run_id: str) -> str:
        run = self.plane._books.runs.find(run_id)
        assert run is not None
        return run.group

    def has(self, group: str) -> set[str]:
        return {slot.run_id for slot in self.groups[group].slots if slot is not None}


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


async def _step(client: Client, run_id: str, number: int) -> Any:
    await client.submit(run_id, 2 * number + 1, pass_command(f"p{number}"))
    return (await client.do(run_id, 2 * number + 2, optim()))["history"]


@virtual
async def test_runs_are_spread_over_the_groups_and_stay_where_they_are(world: World) -> None:
    async with world.up() as client:
        runs = [await client.create(number) for number in range(4)]
        assert [world.home(run) for run in runs] == [FIRST, SECOND, FIRST, SECOND]
        for number in range(2):
            for run in runs:
                history = await _step(client, run, number)
        assert history == ("create", "p0", "optim 1", "p1", "optim 1")
        assert world.has(FIRST) == {runs[0], runs[2]}
        assert world.has(SECOND) == {runs[1], runs[3]}


@virtual
async def test_creations_at_the_same_time_are_spread_too(world: World) -> None:
    async with world.up() as client:
        asked = [
            client.plane.create_model(TENANT, client.session, number, "base", LoraSpec(8), {})
            for number in range(4)
        ]
        for request_id in await asyncio.gather(*asked):
            await client.result(request_id)
        assert {len(world.has(FIRST)), len(world.has(SECOND))} == {2}


@virtual
async def test_runs_that_nobody_is_there_for_do_not_count(world: World) -> None:
    async with world.up() as client:
        gone = [await client.create(number) for number in range(2)]
        await client.plane.finish_session(TENANT, client.session, {})
        await client.open()
        new = [await client.create(number) for number in range(2)]
        assert [world.home(run) for run in gone + new] == [FIRST, SECOND, FIRST, SECOND]


@virtual
async def test_the_loss_of_a_group_does_not_touch_the_other(world: World) -> None:
    async with world.up() as client:
        here, there = await client.create(0), await client.create(1)
        await _step(client, here, 0)
        await _step(client, there, 0)
        world.groups[FIRST].crash_when = lambda tick, phase: phase == "passes" and bool(tick.passes)
        request_id = await client.submit(here, 3, pass_command("p1"))
        while world.groups[FIRST].is_up:
            await asyncio.sleep(0.01)
        world.groups[FIRST].crash_when = lambda tick, phase: False
        assert (await _step(client, there, 1))[-2:] == ("p1", "optim 1")
        assert world.groups[FIRST].rebuilds == 0  # it still is being rebuilt
        assert await client.plane.healthy()
        waiting = await client.plane.poll(TENANT, request_id, 0)
        assert "recovering" in str(waiting.queue_reason)
        assert await client.result(request_id) == ("create", "p0", "optim 1", "p1")
        assert (world.groups[FIRST].rebuilds, world.groups[SECOND].rebuilds) == (1, 0)
        assert not any(tick.restores for tick in world.groups[SECOND].ticks)


@virtual
async def test_new_runs_do_not_wait_for_a_group_that_is_down(world: World) -> None:
    async with world.up() as client:
        busy = await client.create(0)
        await client.create(1)
        world.groups[FIRST].rebuild_failures = 10**6
        world.groups[FIRST].crash_when = lambda tick, phase: True
        await client.submit(busy, 1, pass_command("p0"))
        while world.groups[FIRST].is_up:
            await asyncio.sleep(0.01)
        assert [world.home(await client.create(number)) for number in (2, 3)] == [SECOND, SECOND]


@virtual
async def test_snapshots_are_sampled_where_they_are_and_other_weights_anywhere(world: World) -> None:
    async with world.up() as client:
        await client.create(0)
        there = await client.create(1)
        snapshot = (await client.do(there, 1, SnapshotCommand(0)))["sampling_session_id"]
        results = [await client.sample(snapshot) for _ in range(3)]
        assert [await client.result(request_id) for request_id in results] == [("create",)] * 3
        base = await client.plane.create_sampler(TENANT, client.session, 1, "base", None)
        ids = [await client.sample(base, max_tokens=50) for _ in range(6)]
        await asyncio.gather(*(client.result(request_id) for request_id in ids))
        sampled = {name: sum(len(t.samples) for t in group.ticks) for name, group in world.groups.items()}
        assert sampled == {FIRST: 3, SECOND: 3 + 3}


@virtual
async def test_a_checkpoint_of_one_group_can_be_loaded_in_the_other(world: World) -> None:
    async with world.up() as client:
        here = await client.create(0)
        await _step(client, here, 0)
        path = (await client.do(here, 3, SaveCommand("weights", "n")))["path"]
        request_id = await client.plane.create_model_from(TENANT, client.session, 1, path, True, None, {})
        run_id = (await client.result(request_id))["model_id"]
        assert world.home(run_id) == SECOND
        assert (await _step(client, run_id, 0))[:4] == ("create", "p0", "optim 1", "load")


@virtual
async def test_after_a_restart_runs_are_spread_anew_and_go_on(world: World) -> None:
    async with world.up() as client:
        runs = [await client.create(number) for number in range(4)]
        for run in runs:
            await _step(client, run, 0)
        snapshot = (await client.do(runs[1], 3, SnapshotCommand(7)))["sampling_session_id"]
        await client.do(runs[1], 4, pass_command("again"))
        session = client.session
    world.num_groups = 3
    async with world.up() as client:
        client.session = session
        homes = [world.home(run) for run in runs]
        assert len(set(homes)) == 3
        assert await client.result(await client.sample(snapshot)) == ("create", "p0", "optim 1")
        for run in runs:
            next_seq_id = 5 if run == runs[1] else 3
            history = (await client.do(run, next_seq_id, optim()))["history"]
            assert history[:3] == ("create", "p0", "optim 1")


@virtual
async def test_a_group_can_be_added_without_touching_the_others(world: World) -> None:
    world.num_groups = 1
    async with world.up() as client:
        runs = [await client.create(number) for number in range(2)]
        history = await _step(client, runs[0], 0)
        world.groups[SECOND] = world.new_group()
        client.plane.add_group(SECOND, world.groups[SECOND], world.config(2).models[0])
        new = await client.create(2)
        assert world.home(new) == SECOND
        assert [info.name for info in await client.plane.models()] == ["base"]
        assert (await _step(client, runs[0], 1))[: len(history)] == history
        await _step(client, new, 0)
        assert world.groups[FIRST].rebuilds == 0


@virtual
async def test_a_run_that_the_journal_forgot_lives_where_its_checkpoint_was_loaded(world: World) -> None:
    """When the first group comes later, the run is not looked for there for want of anything better."""
    world.on_disk = True
    async with world.up() as client:
        run = await client.create()
        path = (await client.do(run, 1, SaveCommand("weights", "n")))["path"]
        session = client.session
    world.journal, world.first_number = MemoryJournal(random.Random(0)), 2
    async with world.up() as client:
        client.session = session
        loading = await client.submit(run, 2, LoadCommand(path, True))
        assert world.home(run) == SECOND
        assert (await client.plane.poll(TENANT, loading, 0)).state == "pending"
        await client.result(loading)
        world.groups[FIRST] = world.new_group()
        client.plane.add_group(FIRST, world.groups[FIRST], world.config(2).models[0])
        assert (await client.do(run, 3, optim()))["history"][-2:] == ("load", "optim 1")
        assert world.has(SECOND) == {run}


class TwoModels(World):
    """A deployment with a second base model, which may be missing when it is started again."""

    served = ("base", "other")

    def config(self, num_groups: int) -> Config:
        models = [{"name": name, "path": "nowhere"} for name in self.served]
        return Config.model_validate({"models": models, "storage": {"snapshot_every_steps": 1}})

    @asynccontextmanager
    async def up(self) -> AsyncIterator[Client]:
        self.groups = {name: self.new_group_of(name) for name in self.served}
        self.journal = self.journal.opened()
        catalog, config = Catalog(self.root, None), self.config(1)
        durability = Durability(self.journal, MemoryFiles(self.files))
        self.plane = ControlPlane(self.groups, catalog, config, VirtualClock(), durability=durability)
        await self.plane.start()
        try:
            yield Client(self.plane)
        finally:
            await self.plane.close()
            catalog.close()

    def new_group_of(self, name: str) -> EchoGroup:
        group = EchoGroup(name)
        group.files, group.stored = self.files, self.stored
        return group


@virtual
async def test_runs_of_a_model_that_comes_later_are_taken_up_when_it_comes(tmp_path: Path) -> None:
    """A coordinator that was killed starts with the deployment it was made for, which may lack a model."""
    world = TwoModels(tmp_path, 1)
    async with world.up() as client:
        await client.open()
        request_id = await client.plane.create_model(TENANT, client.session, 0, "other", LoraSpec(8), {})
        run = (await client.result(request_id))["model_id"]
        await client.do(run, 1, pass_command("p0"))
        await client.do(run, 2, optim())
        snapshot = (await client.do(run, 3, SnapshotCommand(7)))["sampling_session_id"]
        world.groups["other"].pass_s = 10**6  # longer than it will live
        waiting = await client.submit(run, 4, pass_command("p1"))
        session = client.session
    world.served = ("base",)
    async with world.up() as client:
        client.session = session
        poll = await client.plane.poll(TENANT, waiting, 1.0)
        assert poll.state == "pending"
        with pytest.raises(NotFound, match="is not served here"):
            await client.plane.run_info(TENANT, run)
        client.plane.expect(["base", "other"])  # the first replica says so
        for asked in (
            client.plane.submit(TENANT, run, 5, optim()),
            client.plane.run_info(TENANT, run),
            client.plane.sample(TENANT, snapshot, 0, prompt()),
            client.plane.create_model(TENANT, session, 1, "other", LoraSpec(8), {}),
        ):
            with pytest.raises(BackendUnavailable, match="'other' is being loaded"):
                await asked  # not a 404, which ends a client's program
        world.served = ("base", "other")
        world.groups["other"] = world.new_group_of("other")
        client.plane.add_group("other", world.groups["other"], world.config(1).models[1])
        await client.result(waiting)
        history = (await client.do(run, 5, optim()))["history"]
        assert history == ("create", "p0", "optim 1", "p1", "optim 1")
        assert (await client.result(await client.sample(snapshot)))[:2] == ("create", "p0")


@virtual
async def test_a_run_of_a_model_that_is_served_no_more_can_be_looked_at(tmp_path: Path) -> None:
    world = TwoModels(tmp_path, 1)
    async with world.up() as client:
        await client.open()
        run, gone = await client.create(0), await client.create(1)
        await client.do(run, 1, pass_command("p0"))
        await client.do(gone, 1, UnloadCommand())
    world.served = ("other",)
    async with world.up() as client:
        listed, _ = await client.plane.list_runs(TENANT, 10, 0)
        assert {each["training_run_id"] for each in listed} == {run, gone}
        insight = await client.plane.run_insight(TENANT, run)
        assert insight["status"]["state"] == "not_served"
        assert "steps" in insight
        assert (await client.plane.run_insight(TENANT, gone))["status"]["state"] == "unloaded"


@virtual
async def test_what_is_not_served_is_answered_with_what_is(world: World) -> None:
    async with world.up() as client:
        with pytest.raises(NotFound, match=r"'other' is not served here; there is: base$"):
            await client.plane.create_model(TENANT, client.session, 0, "other", LoraSpec(8), {})


# Groups that only sample ----------------------------------------------------------------------------------


def sampled_in(world: World) -> set[str]:
    """The groups that were given samples so far."""
    return {name for name, group in world.groups.items() if any(tick.samples for tick in group.ticks)}


@virtual
async def test_no_run_lives_in_a_group_that_only_samples(world: World) -> None:
    world.num_groups, world.num_sampling = 3, 1
    async with world.up() as client:
        runs = [await client.create(number) for number in range(6)]
        assert {world.home(run) for run in runs} == {"base", "base#2"}
        sampler = await world.plane.create_sampler(TENANT, client.session, 0, "base", None)
        for _ in range(5):
            await client.result(await client.sample(sampler))
        assert sampled_in(world) == {"base#3"}


@virtual
async def test_snapshots_are_sampled_elsewhere_once_they_are_on_disk(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    world.num_sampling = 1
    async with world.up() as client:
        monkeypatch.setattr(world.plane._sampling, "_path_of", lambda sampler_id: None)
        run = await client.create()
        await client.do(run, 1, pass_command("one"))
        sampler = (await client.do(run, 2, SnapshotCommand(0)))["sampling_session_id"]
        at_once = await client.sample(sampler, max_tokens=300)
        await client.do(run, 3, pass_command("two"))
        monkeypatch.undo()
        later = await client.sample(sampler)
        assert await client.result(at_once) == await client.result(later) == ("create", "one")
        assert sampled_in(world) == {FIRST, SECOND}
        assert not any(tick.passes for tick in world.groups[SECOND].ticks)


@virtual
async def test_checkpoints_are_sampled_in_the_group_that_only_samples(world: World) -> None:
    world.num_sampling = 1
    async with world.up() as client:
        run = await client.create()
        path = (await client.do(run, 1, SaveCommand("sampler_weights", "n")))["path"]
        sampler = await world.plane.create_sampler(TENANT, client.session, 0, None, path)
        assert await client.result(await client.sample(sampler)) == ("create",)
        assert sampled_in(world) == {SECOND}


@virtual
async def test_where_only_a_sampling_group_is_up_runs_wait_and_samples_do_not(world: World) -> None:
    """A model that is added while others are served may get its sampling group first."""
    async with world.up() as client:
        run = await client.create()
        waiting = await client.submit(run, 2, optim())  # seq_id 1 comes later
        session = client.session
    world.num_sampling, world.first_number = 1, 2
    async with world.up() as client:
        client.session = session
        sampler = await world.plane.create_sampler(TENANT, client.session, 0, "base", None)
        assert await client.result(await client.sample(sampler)) is not None
        with pytest.raises(BackendUnavailable, match="no group of base that trains is up yet"):
            await client.plane.create_model(TENANT, client.session, 1, "base", LoraSpec(8), {})
        with pytest.raises(BackendUnavailable, match="no group of base that trains is up yet"):
            await client.submit(run, 1, pass_command("p0"))
        poll = await client.plane.poll(TENANT, waiting, 0)
        assert (poll.state, poll.queue_reason) == ("pending", "the base model of this run is not loaded")
        assert (await client.plane.run_insight(TENANT, run))["status"]["state"] == "not_served"
        world.groups[FIRST] = world.new_group()
        client.plane.add_group(FIRST, world.groups[FIRST], world.config(2).models[0])
        await client.do(run, 1, pass_command("p0"))
        assert (await client.result(waiting))["history"] == ("create", "p0", "optim 1")
        assert await client.create(1) in world.has(FIRST)
