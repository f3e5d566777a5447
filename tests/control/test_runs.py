from __future__ import annotations

import pytest

from twinkle_serve.control.backend import NotFound
from twinkle_serve.control.runs import Runs, run_id_for
from twinkle_serve.protocol.data import LoraSpec
from twinkle_serve.storage.records import RunRecord


def record(number: int = 0, tenant: str = "alice", **fields) -> RunRecord:
    run_id = run_id_for("s", number)
    return RunRecord(run_id, "s", number, tenant, "base", LoraSpec(8), 0.0, 0.0, **fields)


@pytest.fixture
def saved() -> list[RunRecord]:
    return []


@pytest.fixture
def runs(saved) -> Runs:
    return Runs(lambda base_model: 300.0, saved.append)


def test_the_id_is_what_the_sdk_computes():
    assert run_id_for("session-x", 3) == "session-x:train:3"


def test_a_new_run_is_saved_and_down_until_it_has_an_adapter(runs, saved):
    run = runs.create(record())
    assert saved == [record()]
    assert run.down is not None
    assert runs.find(run.run_id) is run


def test_other_tenants_see_nothing(runs):
    run = runs.create(record())
    assert runs.get("alice", run.run_id) is run
    with pytest.raises(NotFound):
        runs.get("bob", run.run_id)
    with pytest.raises(NotFound):
        runs.get("alice", "unknown")
    assert runs.find("unknown") is None


def test_the_time_of_the_last_request_is_exact_in_memory_and_rarely_on_disk(runs, saved):
    run = runs.create(record())
    for now in range(1, 100):
        runs.usable("alice", run.run_id, float(now))
        assert run.record.last_request_at == now
    assert [r.last_request_at for r in saved] == [0.0, 60.0]


def test_an_unloaded_run_takes_no_commands(runs, saved):
    run = runs.create(record())
    runs.unload(run)
    assert saved[-1].unloaded
    with pytest.raises(NotFound, match="unloaded"):
        runs.usable("alice", run.run_id, 1.0)
    assert runs.get("alice", run.run_id) is run


def test_a_restored_run_says_what_happened_and_takes_any_seq_id_first(runs, saved):
    run = runs.restore(record())
    assert "server restarted" in run.down.message
    assert run.log.append(42, "r", "c", 0.0) is None
    assert len(run.log.ready) == 1
    assert saved == []


def test_listing_is_newest_first(runs):
    for number in range(3):
        runs.create(record(number))
    runs.create(record(9, tenant="bob"))
    assert [run.record.model_seq_id for run in runs.of_tenant("alice")] == [2, 1, 0]
    assert runs.of_tenant("carol") == []


def test_a_run_that_cannot_be_saved_does_not_exist_and_may_be_created_again(saved):
    full = [True]
    runs = Runs(lambda base_model: 300.0, lambda record: 1 / 0 if full[0] else saved.append(record))
    with pytest.raises(ZeroDivisionError):
        runs.create(record())
    assert runs.of_tenant("alice") == runs.of_model("base") == []
    full[0] = False
    assert runs.create(record()).record == saved[-1]
