from __future__ import annotations

from dataclasses import replace

import pytest

from twinkle_serve.control.backend import NotFound
from twinkle_serve.control.samplers import Samplers, sampler_id_for
from twinkle_serve.storage.records import SamplerRecord


def snapshot(number: int, run_id: str = "run", base_model: str = "base") -> SamplerRecord:
    sampler_id = sampler_id_for("s", number)
    return SamplerRecord(sampler_id, "s", "alice", base_model, 0.0, run_id=run_id, snapshot=sampler_id)


@pytest.fixture
def samplers() -> Samplers:
    return Samplers(2, lambda record: None)


def add(samplers: Samplers, *numbers: int, **fields) -> None:
    for number in numbers:
        samplers.create(snapshot(number, **fields))
        samplers.retire(fields.get("run_id", "run"))


def ids(*numbers: int) -> list[str]:
    return [sampler_id_for("s", number) for number in numbers]


def test_the_newest_of_each_run_stay(samplers):
    add(samplers, 0, 1, 2, 3)
    add(samplers, 10, run_id="other")
    assert samplers.evict("base") == ids(0, 1)
    assert samplers.evict("base") == []
    samplers.usable("alice", ids(3)[0])
    with pytest.raises(NotFound, match="only the newest 2"):
        samplers.usable("alice", ids(0)[0])
    samplers.get("alice", ids(0)[0])
    add(samplers, 4)
    assert samplers.evict("base") == ids(2)


def test_requests_in_flight_keep_a_snapshot_but_no_new_ones_come(samplers):
    add(samplers, 0)
    samplers.started(ids(0)[0])
    samplers.started(ids(0)[0])
    add(samplers, 1, 2)
    assert samplers.evict("base") == []
    with pytest.raises(NotFound):
        samplers.usable("alice", ids(0)[0])
    samplers.ended(ids(0)[0])
    assert samplers.evict("base") == []
    samplers.ended(ids(0)[0])
    assert samplers.evict("base") == ids(0)


def test_a_group_is_told_of_its_own_snapshots_only(samplers):
    add(samplers, 0, 1, 2, base_model="small")
    assert samplers.evict("base") == []
    assert samplers.evict("small") == ids(0)


def test_a_run_that_ends_keeps_none(samplers):
    add(samplers, 0, 1)
    samplers.retire("run", keep=0)
    assert samplers.evict("base") == ids(0, 1)
    samplers.retire("unknown", keep=0)


def test_a_lost_group_has_no_snapshots(samplers):
    add(samplers, 0, 1, 2)
    add(samplers, 10, run_id="other", base_model="small")
    samplers.lose_snapshots("base")
    assert samplers.evict("base") == []
    with pytest.raises(NotFound):
        samplers.usable("alice", ids(2)[0])
    samplers.usable("alice", ids(10)[0])
    add(samplers, 3, 4, 5)
    assert samplers.evict("base") == ids(3)


def test_samplers_of_checkpoints_survive_a_restart_and_snapshots_do_not(samplers):
    samplers.restore(snapshot(0))
    samplers.restore(
        SamplerRecord("s:sample:1", "s", "alice", "base", 0.0, model_path="tinker://a/weights/b")
    )
    samplers.usable("alice", "s:sample:1")
    with pytest.raises(NotFound):
        samplers.usable("alice", "s:sample:0")
    assert samplers.of_session("s") == ["s:sample:0", "s:sample:1"]


def test_other_tenants_see_nothing(samplers):
    add(samplers, 0)
    assert samplers.exists(ids(0)[0])
    with pytest.raises(NotFound):
        samplers.get("bob", ids(0)[0])


# The kind inflight ----------------------------------------------------------------------------------------


def publish(samplers: Samplers, number: int) -> None:
    record = replace(snapshot(number), seq_id=number, inflight=True)
    samplers.create(record)
    samplers.retire("run")


def source_of(samplers: Samplers, number: int) -> str:
    return samplers.source(samplers.usable("alice", ids(number)[0])).record.sampler_id


def test_all_inflight_samplers_draw_from_the_newest_snapshot_of_their_kind(samplers):
    publish(samplers, 0)
    add(samplers, 1)
    publish(samplers, 2)
    assert [source_of(samplers, number) for number in (0, 1, 2)] == ids(2, 1, 2)
    assert samplers.evict("base") == ids(0)
    assert source_of(samplers, 0) == ids(2)[0]


def test_an_older_inflight_snapshot_stays_while_a_request_is_on_it(samplers):
    publish(samplers, 0)
    samplers.started(ids(0)[0])
    publish(samplers, 1)
    assert samplers.evict("base") == []
    samplers.ended(ids(0)[0])
    assert samplers.evict("base") == ids(0)


def test_the_newest_inflight_snapshot_does_not_count_among_the_kept_ones(samplers):
    publish(samplers, 0)
    add(samplers, 1, 2, 3, 4)
    assert samplers.evict("base") == ids(1, 2)
    assert source_of(samplers, 0) == ids(0)[0]
    samplers.retire("run", keep=0)
    assert sorted(samplers.evict("base")) == ids(0, 3, 4)
    with pytest.raises(NotFound):
        samplers.usable("alice", ids(0)[0])


def test_after_a_restart_the_newest_one_is_known_again():
    records: list[SamplerRecord] = []
    old = Samplers(2, records.append)
    for number in (0, 3, 1):
        publish(old, number)
    new = Samplers(2, lambda record: None)
    for record in records:
        new.restore(record)
    for sampler in new.with_snapshot():
        new.relocate(sampler, f"/{sampler.record.sampler_id}", awaited=False)
    assert [source_of(new, number) for number in (0, 1, 3)] == ids(3) * 3
