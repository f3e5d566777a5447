"""Files are the same whatever the sharding: saved by two ranks and loaded by one, and the other way round."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.engine.sharding import remote
from tests.engine.sharding.compare import Both, assert_near, passes
from tests.engine.sharding.conftest import BothFactory
from tests.engine.sharding.test_training import SPECS, step_all, ways, work
from tests.engine.ticks import run as run_alone
from twinkle_serve.engine.state_files import read_state
from twinkle_serve.protocol.data import LoraSpec
from twinkle_serve.protocol.work import (
    CreateAdapter,
    DropRun,
    LoadAdapter,
    Outcome,
    PageOut,
    PersistRun,
    RestoreRun,
    SaveAdapter,
    Snapshot,
    Tick,
)


def trained(pair: Both) -> None:
    """Three runs after a step, with gradients since."""
    pair.create(SPECS)
    pair.run(**passes(work(1, [[9, 2], [5, 4], [7]])))
    step_all(pair)
    pair.run(**passes(work(2, [[3, 3], [6, 5], [2]])))


def on_crew(pair: Both, **fields: object) -> dict[str, Outcome]:
    items, *_ = pair.crew.run(remote.run_tick, pair.config, Tick(1, **fields))  # type: ignore[arg-type]
    return {item.request_id: item for item in items if isinstance(item, Outcome)}


def drop_all() -> tuple[DropRun, ...]:
    return tuple(DropRun(f"run{slot}", slot) for slot in range(len(SPECS)))


@ways
def test_a_checkpoint_is_the_same_files(both: BothFactory, sharding: str, tmp_path: Path) -> None:
    pair = both(sharding)
    trained(pair)
    for slot in range(len(SPECS)):
        one, two = ([SaveAdapter("s", slot, str(tmp_path / f"{who}{slot}"), True, {})] for who in "ab")
        assert run_alone(pair.one, saves=tuple(one))["s"].failure is None
        assert on_crew(pair, saves=tuple(two))["s"].failure is None
        a, b = tmp_path / f"a{slot}", tmp_path / f"b{slot}"
        assert sorted(p.name for p in a.iterdir()) == sorted(p.name for p in b.iterdir())
        assert (a / "adapter_config.json").read_bytes() == (b / "adapter_config.json").read_bytes()
        for name in ("adapter_model.safetensors", "optimizer.safetensors"):
            expected, found = load_file(a / name), load_file(b / name)
            assert found.keys() == expected.keys()
            for key, tensor in expected.items():
                if tensor.any():
                    assert_near(found[key], tensor, key)
                else:
                    assert not found[key].any()
        assert json.loads((a / "manifest.json").read_text())["step"] == 1


@ways
@pytest.mark.parametrize("writer", ["one", "several"])
def test_training_goes_on_from_the_others_checkpoint(
    both: BothFactory, sharding: str, writer: str, tmp_path: Path
) -> None:
    pair = both(sharding)
    trained(pair)
    saves = tuple(SaveAdapter(f"s{i}", i, str(tmp_path / f"{i}"), True, {}) for i in range(len(SPECS)))
    found = run_alone(pair.one, saves=saves) if writer == "one" else on_crew(pair, saves=saves)
    assert all(outcome.failure is None for outcome in found.values())
    loads = tuple(LoadAdapter(f"l{i}", f"run{i}", i, str(tmp_path / f"{i}"), True) for i in range(len(SPECS)))
    pair.run(loads=loads)
    pair.run(**passes(work(3, [[3, 3], [6, 5], [2]])))
    step_all(pair)
    pair.run(**passes(work(4, [[8]])))
    pair.assert_same_slots([0])


@ways
@pytest.mark.parametrize("writer", ["one", "several"])
def test_a_whole_run_moves_with_its_pending_gradients(
    both: BothFactory, sharding: str, writer: str, tmp_path: Path
) -> None:
    """From a slot and from where it was paged out to; gradients are neither halved nor doubled."""
    pair = both(sharding)
    trained(pair)
    pair.run(page_out=(PageOut(1, "run1"),))
    persists = tuple(
        PersistRun(f"p{i}", f"run{i}", None if i == 1 else i, str(tmp_path / f"{i}.safetensors"))
        for i in range(len(SPECS))
    )
    if writer == "one":
        written = dict(run_alone(pair.one, persists=persists))
        while len(written) < len(SPECS):
            written |= run_alone(pair.one)
    else:
        written = on_crew(pair, persists=persists)
        while len(written) < len(SPECS):
            written |= on_crew(pair)
    assert all(outcome.failure is None for outcome in written.values())
    pair.run(drops=(DropRun("run0", 0), DropRun("run1", None), DropRun("run2", 2)))
    restores = tuple(RestoreRun(f"r{i}", f"run{i}", i, str(tmp_path / f"{i}.safetensors")) for i in range(3))
    pair.run(restores=restores)
    pair.assert_same_slots(range(3))
    pair.run(**passes(work(5, [[4], [5, 6], [3]])))
    pair.assert_same_slots(range(3))
    step_all(pair)
    pair.run(**passes(work(6, [[4]])))
    pair.assert_same_slots([0])


@ways
def test_a_snapshot_on_disk_is_a_whole_adapter(both: BothFactory, sharding: str, tmp_path: Path) -> None:
    pair = both(sharding)
    pair.create(SPECS[:1])
    path = tmp_path / "snapshot.safetensors"
    assert on_crew(pair, snapshots=(Snapshot("s", 0, "snap", str(path)),))["s"].failure is None
    found = on_crew(pair, persists=(PersistRun("p", "run0", 0, str(tmp_path / "run.safetensors")),))
    while not found:  # the snapshot is written before the run
        found = on_crew(pair)
    assert torch.equal(read_state(path).weights, pair.one.pool.state(0).weights)


@ways
def test_a_checkpoint_that_cannot_be_loaded_changes_nothing(
    both: BothFactory, sharding: str, tmp_path: Path
) -> None:
    pair = both(sharding)
    pair.create(SPECS[:2])
    assert on_crew(pair, saves=(SaveAdapter("s", 1, str(tmp_path / "c"), True, {}),))["s"].failure is None
    loads = [
        LoadAdapter("missing", "run0", 0, str(tmp_path / "nowhere"), True),
        LoadAdapter("other shape", "run0", 0, str(tmp_path / "c"), True),
    ]
    for load in loads:
        assert pair.run(loads=(load,))[load.request_id].failure is not None
    (tmp_path / "c" / "adapter_model.safetensors").write_bytes(b"damaged")
    damaged = LoadAdapter("damaged", "run1", 1, str(tmp_path / "c"), True)
    assert pair.run(loads=(damaged,))["damaged"].failure is not None
    restore = RestoreRun("r", "run2", 2, str(tmp_path / "nothing.safetensors"))
    assert pair.run(restores=(restore,))["r"].failure is not None
    pair.run(creates=(CreateAdapter("c", "run2", 2, LoraSpec(2, 9)),))
    pair.run(**passes(work(1, [[9, 2], [5, 4]])))
    pair.assert_same_slots([0, 1])


def test_a_full_disk_is_the_failure_of_the_save_alone(both: BothFactory, tmp_path: Path) -> None:
    pair = both("expert_parallel")
    pair.create(SPECS[:1])
    blocked = tmp_path / "file"
    blocked.write_text("")
    failure = on_crew(pair, saves=(SaveAdapter("s", 0, str(blocked / "c"), True, {}),))["s"].failure
    assert failure is not None
    assert failure.category == "server"
    pair.run(**passes(work(1, [[9, 2]])))
    pair.assert_same_slots([0])
