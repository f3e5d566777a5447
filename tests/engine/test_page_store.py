"""States in host memory and on disk: what goes in comes out, within the budget."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from twinkle_serve.engine.page_store import PageStore, new_page_directory
from twinkle_serve.engine.slots import AdapterState
from twinkle_serve.protocol.data import LoraSpec

WIDTH = 16


def state(seed: int, rank: int = 2, *, blocks: int = 4) -> AdapterState:
    """A state with weights, and as many of the other blocks as ``blocks`` allows."""
    generator = torch.Generator().manual_seed(seed)
    parts = [torch.randn(rank, WIDTH, generator=generator) for _ in range(blocks)]
    parts += [None] * (4 - blocks)  # type: ignore[list-item]
    spec = LoraSpec(rank=rank, seed=seed, train_mlp=seed % 2 == 0)
    return AdapterState(spec, *parts, step=seed)


def assert_same(found: AdapterState, expected: AdapterState) -> None:
    assert (found.spec, found.step) == (expected.spec, expected.step)
    for name in ("weights", "grads", "exp_avg", "exp_avg_sq"):
        a, b = getattr(found, name), getattr(expected, name)
        assert (a is None) == (b is None)
        assert a is None or torch.equal(a, b)


@pytest.mark.parametrize("budget", [0, 10**9], ids=["disk", "host"])
@pytest.mark.parametrize("blocks", [1, 2, 4])
def test_a_state_comes_back_as_it_was(budget: int, blocks: int, tmp_path: Path) -> None:
    store = PageStore(tmp_path / "pages", budget)
    store.put("run:1/odd name", state(5, blocks=blocks))
    assert "run:1/odd name" in store
    assert_same(store.get("run:1/odd name"), state(5, blocks=blocks))
    assert_same(store.pop("run:1/odd name"), state(5, blocks=blocks))
    assert "run:1/odd name" not in store
    assert (store.host_bytes, store.disk_bytes) == (0, 0)
    assert list(tmp_path.rglob("*.safetensors")) == []


def test_the_least_recently_used_go_to_disk(tmp_path: Path) -> None:
    size = state(0).num_bytes()
    store = PageStore(tmp_path, 3 * size)
    for key in range(3):
        store.put(f"{key}", state(key))
    store.get("0")
    store.put("3", state(3))
    assert (store.host_bytes, store.disk_bytes) == (3 * size, size)
    assert_same(store.get("1"), state(1))  # from disk, where it stays
    assert store.disk_bytes == size
    store.put("4", state(4))
    assert store.disk_bytes == 2 * size
    for key in range(5):
        assert_same(store.pop(f"{key}"), state(key))
    assert (store.host_bytes, store.disk_bytes) == (0, 0)


def test_a_state_larger_than_the_budget_goes_to_disk_at_once(tmp_path: Path) -> None:
    store = PageStore(tmp_path, state(0).num_bytes())
    store.put("large", state(1, rank=3))
    assert store.host_bytes == 0
    assert_same(store.get("large"), state(1, rank=3))


@pytest.mark.parametrize("budget", [0, 10**9], ids=["disk", "host"])
def test_putting_again_replaces(budget: int, tmp_path: Path) -> None:
    store = PageStore(tmp_path, budget)
    store.put("a", state(1))
    store.put("a", state(2, rank=1))
    assert store.host_bytes + store.disk_bytes == state(2, rank=1).num_bytes()
    assert_same(store.get("a"), state(2, rank=1))


def test_absent_keys(tmp_path: Path) -> None:
    store = PageStore(tmp_path, 0)
    store.drop("nothing")
    for find in (store.get, store.pop):
        with pytest.raises(KeyError):
            find("nothing")


KEYS = st.sampled_from("abc")
PROGRAM = st.lists(
    st.one_of(
        st.tuples(st.just("put"), KEYS, st.integers(0, 9), st.integers(1, 3)),
        st.tuples(st.sampled_from(["get", "pop", "drop"]), KEYS, st.just(0), st.just(0)),
    ),
    max_size=12,
)


@given(program=PROGRAM, budget=st.integers(0, 4))
def test_it_is_a_dictionary_whatever_the_budget(
    program: list[tuple[str, str, int, int]], budget: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    store = PageStore(tmp_path_factory.mktemp("pages"), budget * state(0).num_bytes())
    model: dict[str, AdapterState] = {}
    for action, key, seed, rank in program:
        if action == "put":
            store.put(key, state(seed, rank))
            model[key] = state(seed, rank)
        elif action == "drop":
            store.drop(key)
            model.pop(key, None)
        elif key in model:
            assert_same(store.get(key) if action == "get" else store.pop(key), model[key])
            if action == "pop":
                del model[key]
        assert store.host_bytes <= budget * state(0).num_bytes()
        assert store.host_bytes + store.disk_bytes == sum(s.num_bytes() for s in model.values())
        assert all((key in store) == (key in model) for key in "abc")


def test_directories_of_killed_processes_are_removed_and_of_others_are_not(tmp_path: Path) -> None:
    first = new_page_directory(tmp_path / "pages")
    with subprocess.Popen([sys.executable, "-c", ""]) as ended:
        pass
    left_behind = Path(str(first).replace(f"-{os.getpid()}-", f"-{ended.pid}-"))
    elsewhere = [
        tmp_path / "pages" / f"twinkle-pages-{host}-{ended.pid}-x"
        for host in ("another-host", f"{socket.gethostname()}-2", f"{socket.gethostname()}-{ended.pid}")
    ]
    for directory in (left_behind, *elsewhere):
        directory.mkdir()
        (directory / "page").write_bytes(b"x")
    second = new_page_directory(tmp_path / "pages")
    assert second != first
    assert {first, second, *elsewhere} == set((tmp_path / "pages").iterdir())


def test_a_disk_that_takes_no_more_costs_only_the_newcomer(tmp_path: Path) -> None:
    (tmp_path / "pages").write_text("a file where the directory should be")
    first, second = state(2), state(2)
    store = PageStore(tmp_path / "pages", first.num_bytes())
    store.put("first", first)
    with pytest.raises(OSError, match="pages"):
        store.put("second", second)
    assert "second" not in store
    assert store.get("first") is first
    assert (store.host_bytes, store.disk_bytes) == (first.num_bytes(), 0)


def test_what_the_disk_cannot_take_overflows_into_host_memory_until_it_can(tmp_path: Path) -> None:
    obstacle = tmp_path / "pages"
    obstacle.write_text("a file where the directory should be")
    store = PageStore(obstacle, 0, overflows=True)
    for key in range(2):
        store.put(f"{key}", state(key))
    assert (store.host_bytes, store.disk_bytes) == (2 * state(0).num_bytes(), 0)
    obstacle.unlink()
    store.put("2", state(2))
    assert (store.host_bytes, store.disk_bytes) == (0, 3 * state(0).num_bytes())
    for key in range(3):
        assert_same(store.pop(f"{key}"), state(key))
