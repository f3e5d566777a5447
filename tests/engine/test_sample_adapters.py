"""Which adapters stay in the pool: those in use always, others until their place is needed."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.engine.test_adapter_pool import LAYOUT, pool, state
from twinkle_serve.engine.adapter_pool import PoolFull
from twinkle_serve.engine.page_store import PageStore
from twinkle_serve.engine.sample_adapters import SampleAdapters
from twinkle_serve.engine.sharding.ranks import Ranks
from twinkle_serve.engine.sharding.shares import Shares
from twinkle_serve.protocol.work import AdapterRef


@pytest.fixture
def adapters(tmp_path: Path) -> SampleAdapters:
    """Snapshots a, b, c of rank 4 each, and room for two; one that takes it whole."""
    store = PageStore(tmp_path, host_bytes=2**20)
    store.put("whole", state(8))
    for seed, name in enumerate("abc"):
        store.put(name, state(4, seed=seed))
    return SampleAdapters(Shares(LAYOUT, Ranks(), split_experts=False), store, pool(8))


def test_one_that_is_held_stays_and_an_idle_one_goes(adapters: SampleAdapters) -> None:
    a = adapters.hold(AdapterRef("a"))
    b = adapters.hold(AdapterRef("b"))
    with pytest.raises(PoolFull):
        adapters.hold(AdapterRef("c"))
    adapters.let_go(b)
    weights = a.adapter.weights.clone()
    c = adapters.hold(AdapterRef("c"))
    assert c.first == b.first
    assert a.adapter.weights.equal(weights)
    assert adapters.hold(AdapterRef("a")) is a


def test_it_is_held_as_often_as_it_was_asked_for(adapters: SampleAdapters) -> None:
    a = adapters.hold(AdapterRef("a"))
    adapters.hold(AdapterRef("a"))
    adapters.hold(AdapterRef("b"))
    adapters.let_go(a)
    with pytest.raises(PoolFull):
        adapters.hold(AdapterRef("c"))
    adapters.let_go(a)
    assert adapters.hold(AdapterRef("c")).first == a.first


def test_the_least_recently_used_one_goes_first(adapters: SampleAdapters) -> None:
    for name in ("a", "b", "a"):
        adapters.let_go(adapters.hold(AdapterRef(name)))
    a = adapters.hold(AdapterRef("a"))
    assert adapters.hold(AdapterRef("c")).first != a.first


def test_who_finds_no_room_is_read_once_and_throws_nobody_out(
    adapters: SampleAdapters, monkeypatch: pytest.MonkeyPatch
) -> None:
    a = adapters.hold(AdapterRef("a"))
    adapters.let_go(adapters.hold(AdapterRef("b")))
    get, reads = adapters._snapshots.get, []
    monkeypatch.setattr(adapters._snapshots, "get", lambda name: (reads.append(name), get(name))[1])
    for _ in range(3):
        with pytest.raises(PoolFull):
            adapters.hold(AdapterRef("whole"))
    adapters.let_go(adapters.hold(AdapterRef("b")))
    assert reads == ["whole"]
    adapters.let_go(a)
    assert adapters.hold(AdapterRef("whole")).first == 0
    assert reads == ["whole"]


def test_what_found_no_room_is_forgotten_with_its_name(adapters: SampleAdapters) -> None:
    a = adapters.hold(AdapterRef("a"))
    with pytest.raises(PoolFull):
        adapters.hold(AdapterRef("whole"))
    adapters._snapshots.drop("whole")
    adapters.drop("whole")
    adapters.let_go(a)
    with pytest.raises(KeyError):
        adapters.hold(AdapterRef("whole"))


def test_it_is_free_when_the_last_one_lets_go(adapters: SampleAdapters) -> None:
    a = adapters.hold(AdapterRef("a"))
    adapters.hold(AdapterRef("a"))
    assert [adapters.let_go(a), adapters.let_go(a)] == [False, True]


def test_a_dropped_one_in_use_keeps_its_place_until_it_is_let_go(adapters: SampleAdapters) -> None:
    a = adapters.hold(AdapterRef("a"))
    adapters.hold(AdapterRef("b"))
    adapters.drop("a")
    with pytest.raises(PoolFull):
        adapters.hold(AdapterRef("c"))
    adapters.let_go(a)
    assert adapters.hold(AdapterRef("c")).first == a.first


def test_a_dropped_name_is_read_again(adapters: SampleAdapters) -> None:
    a = adapters.hold(AdapterRef("a"))
    adapters.let_go(a)
    adapters.drop("a")
    adapters.drop("never heard of")
    assert adapters.hold(AdapterRef("a")) is not a


def test_a_snapshot_that_is_gone_is_said_so(adapters: SampleAdapters) -> None:
    with pytest.raises(KeyError):
        adapters.hold(AdapterRef("z"))
