"""Which groups a deployment needs before it can serve, and what is tried again."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from twinkle_serve.cluster.fleet import Fleet
from twinkle_serve.cluster.group import LoadError
from twinkle_serve.config import Config, ModelConfig


class Startable:
    """As much of a RayGroup as a fleet sees."""

    def __init__(self, name: str, works: bool) -> None:
        self.name = name
        self.works = works
        self.was_started = False
        self.num_starts = 0
        self.has_room = asyncio.Event()
        self.has_room.set()

    async def start(self) -> None:
        self.num_starts += 1
        await self.has_room.wait()
        if not self.works:
            raise LoadError(f"cannot load {self.name}")
        self.was_started = True

    async def stop(self) -> None:
        self.was_started = False


def _config(*models: dict[str, Any]) -> Config:
    return Config.model_validate({"models": [{"path": "/m"} | model for model in models]})


def _fleet(config: Config, *broken: str, grace_s: float = 0.0) -> Fleet:
    def make(name: str, model: ModelConfig) -> Any:
        return Startable(name, name not in broken)

    return Fleet(config, make, grace_s)


async def test_every_group_of_every_model_is_started_once() -> None:
    fleet = _fleet(_config({"name": "a", "groups": 2}, {"name": "b"}))
    await fleet.start_enough()
    await fleet.start_enough()
    assert list(fleet.started) == ["a", "a#2", "b"]
    assert fleet.missing == []
    assert [group.num_starts for group in fleet.groups.values()] == [1, 1, 1]


async def test_one_group_of_a_model_is_enough_and_the_other_is_tried_again() -> None:
    fleet = _fleet(_config({"name": "a", "groups": 2}), "a")
    await fleet.start_enough()
    assert list(fleet.started) == ["a#2"]
    with pytest.raises(LoadError, match="cannot load a"):
        await fleet.start("a")
    fleet.groups["a"].works = True
    await fleet.start("a")
    assert fleet.missing == []
    assert fleet.groups["a"].num_starts == 3


async def test_a_group_without_room_does_not_keep_another_away_and_is_not_started_twice() -> None:
    fleet = _fleet(_config({"name": "a", "groups": 2}))
    fleet.groups["a#2"].has_room.clear()
    await fleet.start_enough()
    assert list(fleet.started) == ["a"]
    later = asyncio.create_task(fleet.start("a#2"))
    fleet.groups["a#2"].has_room.set()
    await later
    assert fleet.missing == []
    assert fleet.groups["a#2"].num_starts == 1


async def test_a_group_that_loads_a_little_longer_is_waited_for() -> None:
    fleet = _fleet(_config({"name": "a", "groups": 2}), grace_s=60.0)
    fleet.groups["a#2"].has_room.clear()
    enough = asyncio.create_task(fleet.start_enough())
    while not fleet.groups["a"].was_started:
        await asyncio.sleep(0)
    for _ in range(100):  # turns of the loop
        await asyncio.sleep(0)
    fleet.groups["a#2"].has_room.set()
    await enough
    assert list(fleet.started) == ["a", "a#2"]


async def test_a_start_that_failed_meanwhile_is_heard_of() -> None:
    fleet = _fleet(_config({"name": "a", "groups": 2}), "a#2")
    fleet.groups["a#2"].has_room.clear()
    await fleet.start_enough()
    fleet.groups["a#2"].has_room.set()
    await asyncio.wait(fleet._starts.values())
    with pytest.raises(LoadError, match="cannot load a#2"):
        await fleet.start("a#2")
    assert fleet.groups["a#2"].num_starts == 1


async def test_stopping_ends_the_starts_that_are_under_way() -> None:
    fleet = _fleet(_config({"name": "a", "groups": 2}))
    fleet.groups["a#2"].has_room.clear()
    await fleet.start_enough()
    (start,) = fleet._starts.values()
    await fleet.stop()
    assert start.cancelled()


async def test_a_model_without_any_group_is_an_error_that_names_it() -> None:
    fleet = _fleet(_config({"name": "a"}, {"name": "b"}), "b")
    with pytest.raises(LoadError, match=r"^cannot load b$"):
        await fleet.start_enough()


async def test_a_model_that_cannot_load_is_told_of_while_others_still_wait_for_room() -> None:
    fleet = _fleet(_config({"name": "a", "groups": 2}, {"name": "b"}, {"name": "c"}), "b", grace_s=60.0)
    for name in ("a#2", "c"):
        fleet.groups[name].has_room.clear()
    with pytest.raises(LoadError, match=r"^cannot load b$"):
        await asyncio.wait_for(fleet.start_enough(), 10)
    for group in fleet.groups.values():
        group.works = True
        group.has_room.set()
    await fleet.start_enough()
    assert fleet.missing == []
    assert [group.num_starts for group in fleet.groups.values()] == [1, 1, 2, 1]


async def test_a_model_is_not_given_up_while_another_group_of_it_loads() -> None:
    fleet = _fleet(_config({"name": "a", "groups": 2}, {"name": "b"}), "a")
    fleet.groups["a#2"].has_room.clear()
    enough = asyncio.create_task(fleet.start_enough())
    for _ in range(100):  # turns of the loop
        await asyncio.sleep(0)
    fleet.groups["a#2"].has_room.set()
    await enough
    assert list(fleet.started) == ["a#2", "b"]


async def test_a_model_that_comes_while_others_load_is_not_waited_for() -> None:
    fleet = _fleet(_config({"name": "a"}), "b")
    load = fleet.groups["a"].start

    async def meanwhile() -> None:
        fleet.cover(_config({"name": "a"}, {"name": "b"}))
        await load()

    fleet.groups["a"].start = meanwhile
    await fleet.start_enough()
    assert list(fleet.started) == ["a"]
    assert fleet.missing == ["b"]


def test_two_models_do_not_count_the_same_gpu() -> None:
    fleet = _fleet(_config({"name": "a", "groups": 2}, {"name": "b"}))
    assert {name: fleet.device_of(name, 1) for name in fleet.groups} == {
        "a": "cuda",
        "a#2": "cuda",
        "b": "cpu",
    }
    fleet.cover(_config({"name": "new"}, {"name": "b"}, {"name": "a", "groups": 3}))
    assert fleet.device_of("new", 4) == "cpu", "whoever was there first keeps what it has"
    assert fleet.device_of("new", 5) == "cuda"


async def test_a_group_that_only_samples_is_not_enough() -> None:
    fleet = _fleet(_config({"name": "a", "groups": 2, "sampling_groups": 1}), "a")
    with pytest.raises(LoadError, match=r"^cannot load a$"):
        await fleet.start_enough()
    other = _fleet(_config({"name": "a", "groups": 2, "sampling_groups": 1}), "a#2")
    await other.start_enough()


async def test_a_bug_is_not_taken_for_a_model_that_does_not_load() -> None:
    fleet = _fleet(_config({"name": "a"}))
    fleet.groups["a"].start = _bug
    with pytest.raises(ZeroDivisionError):
        await fleet.start_enough()
    with pytest.raises(ZeroDivisionError):
        await fleet.start("a")


async def test_a_bug_in_one_group_leaves_the_others_to_serve(caplog: pytest.LogCaptureFixture) -> None:
    fleet = _fleet(_config({"name": "a", "groups": 2}))
    fleet.groups["a#2"].start = _bug
    await fleet.start_enough()
    assert list(fleet.started) == ["a"]
    assert "a#2 did not start" in caplog.text
    assert "Traceback" in caplog.text


async def _bug() -> None:
    raise ZeroDivisionError


async def test_what_is_covered_later_is_made_and_not_yet_started() -> None:
    fleet = _fleet(_config({"name": "a"}))
    await fleet.start_enough()
    fleet.cover(_config({"name": "a", "groups": 2}, {"name": "b"}))
    assert fleet.missing == ["a#2", "b"]
    assert fleet.model_of("b").name == "b"
    await fleet.stop()
    assert fleet.started == {}
