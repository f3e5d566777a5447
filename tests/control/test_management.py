"""Copies of checkpoints that meet something: a failure, a newer save, another request for their place."""

from __future__ import annotations

import asyncio
import threading
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

from tests.control.echo_group import EchoGroup
from tests.control.plane import TENANT, Client, control_plane
from twinkle_serve.control.backend import Invalid, SaveCommand, UnloadCommand
from twinkle_serve.control.service import ControlPlane
from twinkle_serve.protocol.errors import BackendUnavailable, Busy
from twinkle_serve.protocol.work import Failure
from twinkle_serve.storage import checkpoints
from twinkle_serve.storage.catalog import Catalog


class World:
    """A control plane on real files, and a run with two checkpoints."""

    def __init__(self, plane: ControlPlane, catalog: Catalog) -> None:
        self.plane, self.catalog = plane, catalog
        self.client = Client(plane)
        self.run = ""

    async def settle(self) -> World:
        await self.client.open()
        self.run = await self.client.create()
        for seq_id, name in enumerate(("one", "two"), 1):
            await self.client.do(self.run, seq_id, SaveCommand("weights", name))
        return self

    def path(self, name: str = "one", number: int = 0) -> str:
        return f"tinker://{self.client.session}:train:{number}/weights/{name}"

    def directory(self, name: str, number: int) -> Path:
        return Path(self.catalog.directory_for(f"{self.client.session}:train:{number}", "weights", name))

    async def copy(self, name: str = "one", number: int = 7) -> str:
        place = (self.client.session, number)
        return await self.plane.copy_checkpoint(TENANT, self.path(name), place, None, None, "")

    @asynccontextmanager
    async def copying(self, name: str = "one", number: int = 7):
        """A copy whose files are there and that has yet to be listed."""
        there, go_on, copy = threading.Event(), threading.Event(), self.catalog.copy_directory

        def slow(*args: Any) -> int:
            size = copy(*args)
            there.set()
            go_on.wait()
            return size

        with patch.object(self.catalog, "copy_directory", slow):
            task = asyncio.create_task(self.copy(name, number))
            try:
                await asyncio.to_thread(there.wait)
                yield task
            finally:
                go_on.set()
                await asyncio.wait({task})


@asynccontextmanager
async def world(root: Path):
    catalog, group = Catalog(root, "sqlite://"), EchoGroup()
    group.on_disk = True
    async with control_plane(root, group, catalog=catalog) as plane:
        yield await World(plane, catalog).settle()


def full(*args: object) -> None:
    raise OSError("No space left on device")


async def test_of_two_copies_to_one_place_at_once_one_is_made_and_the_other_refused(tmp_path: Path) -> None:
    async with world(tmp_path) as here:
        names = ("one", "two")
        outcomes = await asyncio.gather(*map(here.copy, names), return_exceptions=True)
        (lost,) = (
            name for name, outcome in zip(names, outcomes, strict=True) if isinstance(outcome, Invalid)
        )
        (made,) = set(names) - {lost}
        assert here.path(made, 7) in outcomes
        assert not here.directory(lost, 7).exists()
        with pytest.raises(Invalid, match="model_seq_id 7 of session"):
            await here.copy(lost)


async def test_a_run_made_meanwhile_keeps_its_number_and_can_save_under_that_name(tmp_path: Path) -> None:
    async with world(tmp_path) as here:
        async with here.copying() as copy:
            run = await here.client.create(7)
        with pytest.raises(Invalid, match="is taken"):
            copy.result()
        assert not here.directory("one", 7).exists()
        assert (await here.client.do(run, 1, SaveCommand("weights", "one")))["path"] == here.path("one", 7)
        assert here.directory("one", 7).exists()


async def test_a_copy_that_fails_leaves_alone_what_a_run_saves_there_meanwhile(tmp_path: Path) -> None:
    async with world(tmp_path) as here:
        async with here.copying() as copy:
            run = await here.client.create(7)
            await here.client.do(run, 1, SaveCommand("weights", "one", overwrite=True))
        with pytest.raises(Invalid, match="is taken"):
            copy.result()
        assert checkpoints.verify(here.directory("one", 7))["run_id"] == run


@pytest.mark.parametrize("broken", ["put_run", "put_checkpoint"])
async def test_a_copy_that_cannot_be_noted_may_be_asked_for_again(tmp_path: Path, broken: str) -> None:
    async with world(tmp_path) as here:
        # The registry of runs has its own name for the catalogue's method.
        owner, name = (
            (here.catalog, broken) if broken == "put_checkpoint" else (here.plane._books.runs, "_save")
        )
        with patch.object(owner, name, full), pytest.raises(OSError, match="No space left"):
            await here.copy()
        assert not here.directory("one", 7).exists()
        assert await here.copy() == here.path("one", 7)
        assert await here.copy() == here.path("one", 7), "sent twice"
        assert here.directory("one", 7).exists()


async def test_the_number_of_a_run_that_was_trained_and_unloaded_is_taken(tmp_path: Path) -> None:
    async with world(tmp_path) as here:
        run = await here.client.create(7)
        await here.client.do(run, 1, UnloadCommand())
        with pytest.raises(Invalid, match="is taken"):
            await here.copy()


async def test_of_a_checkpoint_that_is_saved_anew_meanwhile_the_new_one_is_copied(tmp_path: Path) -> None:
    async with world(tmp_path) as here:
        anew = SaveCommand("weights", "one", overwrite=True, user_metadata={"step": "2"})
        async with here.copying() as copy:
            await here.client.do(here.run, 3, anew)
        with pytest.raises(BackendUnavailable, match="/weights/one is being saved anew; ask again"):
            copy.result()
        assert not here.directory("one", 7).exists()
        await here.copy()
        (view,), _ = await here.plane.list_checkpoints(TENANT, f"{here.client.session}:train:7", None, 0)
        assert view["user_metadata"] == {"step": "2"}
        assert checkpoints.verify(here.directory("one", 7))["user_metadata"] == {"step": "2"}


async def test_a_checkpoint_is_not_copied_while_it_is_saved(tmp_path: Path) -> None:
    async with world(tmp_path) as here:
        here.plane._books.checkpoints.reserve(here.run, "weights", "one", overwrite=True)
        with pytest.raises(BackendUnavailable, match="is being saved anew"):
            await here.copy()
        here.plane._books.checkpoints._release((here.run, "weights", "one"))
        await here.copy()


async def test_a_source_may_be_deleted_meanwhile(tmp_path: Path) -> None:
    async with world(tmp_path) as here:
        async with here.copying() as copy:
            await here.plane.delete_checkpoint(TENANT, here.path())
        assert copy.result() == here.path("one", 7)
        assert not here.directory("one", 0).exists()
        checkpoints.verify(here.directory("one", 7))


async def test_a_damaged_checkpoint_is_not_copied(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async with world(tmp_path) as here:
        (here.directory("one", 0) / "adapter").write_bytes(b"2")
        with pytest.raises(Invalid, match="/weights/one cannot be copied: its files are damaged"):
            await here.copy()
        assert "sha256 differs" in caplog.text
        assert await here.copy("two") == here.path("two", 7)


async def test_copies_that_are_being_made_count_and_a_full_server_makes_none(tmp_path: Path) -> None:
    async with world(tmp_path) as here:
        books = here.plane._books
        size = books.checkpoints.find(TENANT, here.path()).size_bytes
        room = books.checkpoints.bytes_of(TENANT) + 2 * size
        limits = books.quotas._limits
        tight = limits.tenant.model_copy(update={"checkpoint_bytes": room})
        with patch.object(books.quotas, "_limits", limits.model_copy(update={"tenant": tight})):
            made = await asyncio.gather(*(here.copy(number=7 + n) for n in range(5)), return_exceptions=True)
        assert [isinstance(outcome, Busy) for outcome in made] == [False, False, True, True, True]
        assert books.checkpoints._held == {}
        full_server = patch.object(here.plane, "no_room_for_a_copy", lambda: Failure("full", "server"))
        with full_server, pytest.raises(Busy, match="full"):
            await here.copy(number=20)
