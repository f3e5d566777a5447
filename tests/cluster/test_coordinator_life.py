"""How a coordinator begins and ends, without Ray: its records, its end, groups that come late."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray

from tests.cluster.test_fleet import Startable
from twinkle_serve.cluster.coordinator import Coordinator
from twinkle_serve.cluster.deployment import Deployment
from twinkle_serve.cluster.fleet import Fleet
from twinkle_serve.config import Config
from twinkle_serve.storage.histories import FOLDER

pytestmark = pytest.mark.usefixtures("loggers_as_before")  # a coordinator sets them up


def _coordinator(tmp_path: Path, groups: int = 1, **settings: Any) -> Coordinator:
    """With groups that load nothing. settings: ``section__name``."""
    tree: dict[str, Any] = {"models": [{"name": "a", "path": "/m", "groups": groups}]}
    for key, value in {"storage__root": tmp_path / "store", **settings}.items():
        section, _, name = key.partition("__")
        tree.setdefault(section, {})[name] = value
    config = Config.model_validate(tree)
    coordinator = Coordinator(Deployment(config))
    coordinator._fleet = Fleet(config, _startable, grace_s=0.0)
    return coordinator


def _startable(name: str, _: object) -> Any:
    return Startable(name, works=True)


class Plane:
    """As much of a ControlPlane as a coordinator needs to end and to grow."""

    def __init__(self) -> None:
        self.may_close = asyncio.Event()
        self.closing = asyncio.Event()
        self.groups: asyncio.Queue[str] = asyncio.Queue()
        self.watch = self.histories = self

    def changed(self) -> list[tuple[str, dict[str, Any]]]:
        return [("run", {"loss": [1.0]})]

    async def close(self) -> None:
        self.closing.set()
        await self.may_close.wait()

    def measure(self) -> None:
        pass

    def add_group(self, name: str, group: object, config: object) -> None:
        self.groups.put_nowait(name)


@pytest.mark.parametrize(
    ("setting", "value", "reason"),
    [
        ("storage__catalog_url", "sqlite:////nowhere/x.db", "unable to open database file"),
        ("storage__root", "/dev/null/store", "Not a directory"),
        ("monitoring__log_file", "/dev/null/logs/serve.jsonl", "Not a directory"),
    ],
)
async def test_records_that_cannot_be_opened_are_a_reason_and_no_dead_actor(
    tmp_path: Path, setting: str, value: str, reason: str
) -> None:
    coordinator = _coordinator(tmp_path, **{setting: value})
    await coordinator._try_to_load()
    status = coordinator._status
    assert status.state == "failed"
    assert status.message.startswith("cannot start: opening the log, the catalogue and the ledger: ")
    assert reason in status.message
    assert "\n" not in status.message
    assert coordinator._fleet.started == {}  # known before a model is loaded
    await coordinator.stop()


async def test_records_are_opened_once_as_soon_as_they_can_be(tmp_path: Path) -> None:
    folder = tmp_path / "later"
    coordinator = _coordinator(tmp_path, storage__catalog_url=f"sqlite:///{folder}/x.db")
    await coordinator._try_to_load()
    folder.mkdir()
    assert coordinator._open_records() == coordinator._open_records()
    await coordinator.stop()


async def test_whoever_asks_for_the_end_waits_for_all_of_it(tmp_path: Path) -> None:
    coordinator, plane = _coordinator(tmp_path), Plane()
    coordinator._open_records()
    coordinator._plane = plane  # type: ignore[assignment]
    ends = [asyncio.create_task(coordinator.stop()) for _ in range(2)]
    async with asyncio.timeout(60):
        await plane.closing.wait()
        await asyncio.sleep(0)
        assert not any(end.done() for end in ends)
        group = coordinator._fleet.groups["a"]
        await group.start()
        plane.may_close.set()
        await ends[1]
    assert (tmp_path / "store" / FOLDER / "run.json").exists()
    assert not group.was_started
    await ends[0]


async def test_one_that_nobody_asks_for_ends_itself_to_the_last_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    coordinator, plane = _coordinator(tmp_path, ray__orphan_exit_s=0.01), Plane()
    killed = asyncio.Event()
    monkeypatch.setattr(ray, "get_runtime_context", lambda: SimpleNamespace(current_actor="me"))
    monkeypatch.setattr(ray, "kill", lambda actor, no_restart: killed.set())

    async def load() -> None:
        coordinator._plane = plane  # type: ignore[assignment]

    monkeypatch.setattr(coordinator, "_load", load)
    plane.may_close.set()
    await coordinator.ping()
    async with asyncio.timeout(60):
        await killed.wait()
    assert plane.closing.is_set()


async def test_what_goes_wrong_in_its_loop_does_not_end_the_loop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    coordinator, plane = _coordinator(tmp_path, ray__orphan_exit_s=60.0), Plane()
    measured = asyncio.Queue[None]()

    def measure() -> None:
        measured.put_nowait(None)
        raise RuntimeError("a gauge is broken")

    async def load() -> None:
        coordinator._plane = plane  # type: ignore[assignment]

    monkeypatch.setattr(plane, "measure", measure)
    monkeypatch.setattr(coordinator, "_load", load)
    monkeypatch.setattr("twinkle_serve.cluster.coordinator._GAUGES_EVERY_S", 0.01)
    plane.may_close.set()
    await coordinator.ping()
    async with asyncio.timeout(60):
        for _ in range(3):
            await measured.get()
    await coordinator.stop()


async def test_a_plane_that_does_not_start_leaves_no_writer_of_a_journal(tmp_path: Path) -> None:
    coordinator = _coordinator(tmp_path)
    for _ in range(2):
        await coordinator._try_to_load()  # such groups have no model that a plane could serve
        assert coordinator._status.message.startswith("cannot start: taking up what is in the journal: ")
    assert not [thread for thread in threading.enumerate() if thread.name == "journal"]
    await coordinator.stop()


async def test_patience_is_what_was_deployed_last_and_every_call_is_a_sign_of_life(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [1000.0]
    clock = SimpleNamespace(monotonic=lambda: now[0])
    monkeypatch.setattr("twinkle_serve.cluster.coordinator.time", clock)
    coordinator = _coordinator(tmp_path, ray__orphan_exit_s=120.0)
    monkeypatch.setattr(coordinator, "_run", asyncio.Event().wait)
    now[0] += 119.0
    assert coordinator._is_wanted()
    assert await coordinator.adopt(_coordinator(tmp_path, ray__orphan_exit_s=1800.0)._deployment)
    now[0] += 225.0  # replicas ping eight times in orphan_exit_s, now of the new deployment
    assert coordinator._is_wanted()
    await coordinator.call("list_runs", ())
    now[0] += 1799.0
    assert coordinator._is_wanted()
    now[0] += 2.0
    assert not coordinator._is_wanted()
    await coordinator.stop()


async def test_each_group_that_comes_late_serves_from_then_on(tmp_path: Path) -> None:
    coordinator, plane = _coordinator(tmp_path, groups=3), Plane()
    _, second, third = coordinator._fleet.groups.values()
    second.has_room.clear()
    third.has_room.clear()
    await coordinator._fleet.start_enough()
    second.has_room.set()
    await asyncio.wait([coordinator._fleet._starts["a#2"]])  # while the plane is made
    coordinator._plane, coordinator._served = plane, {"a"}  # type: ignore[assignment]
    async with asyncio.timeout(60):
        coordinator._grow()
        assert await plane.groups.get() == "a#2"
        joining = coordinator._joining["a#3"]
        coordinator._grow()
        assert coordinator._joining["a#3"] is joining
        third.has_room.set()
        assert await plane.groups.get() == "a#3"
    coordinator._grow()
    await asyncio.wait(coordinator._joining.values())
    assert plane.groups.empty()
    assert [group.num_starts for group in (second, third)] == [1, 1]


async def test_a_group_that_does_not_start_is_told_of_and_left_alone_for_a_while(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    coordinator, plane = _coordinator(tmp_path, groups=3), Plane()
    coordinator._plane, coordinator._served = plane, {"a"}  # type: ignore[assignment]
    _, second, third = coordinator._fleet.groups.values()
    second.works = None
    third.start = _bug
    coordinator._grow()
    await asyncio.wait(coordinator._joining.values())
    assert "a#2 did not start: cannot load a#2; it is tried again in 30 s" in caplog.text
    assert "a#3 did not start: planted; it is tried again in 30 s\nTraceback" in caplog.text
    coordinator._grow()
    await asyncio.wait(coordinator._joining.values())
    assert second.num_starts == 1
    assert plane.groups.empty()


async def _bug() -> None:
    raise ZeroDivisionError("planted")


async def test_a_group_that_comes_while_all_ends_is_not_added(tmp_path: Path) -> None:
    coordinator, plane = _coordinator(tmp_path, groups=2), Plane()
    coordinator._plane, coordinator._served = plane, {"a"}  # type: ignore[assignment]
    late = coordinator._fleet.groups["a#2"]
    late.has_room.clear()
    coordinator._grow()
    end = asyncio.create_task(coordinator.stop())
    async with asyncio.timeout(60):
        await plane.closing.wait()
        late.has_room.set()
        await asyncio.wait(coordinator._joining.values())
        plane.may_close.set()
        await end
    assert coordinator._joining["a#2"].cancelled()
    assert plane.groups.empty()
    assert not late.was_started
