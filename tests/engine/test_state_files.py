"""A run's state on disk: to the bit, checked, written behind the training's back and in order."""

from __future__ import annotations

import contextlib

import pytest
import torch

from tests.engine.ticks import ADAM, run, value
from tests.engine.ticks import create as create_adapter
from twinkle_serve.engine.engine import Engine
from twinkle_serve.engine.slots import AdapterState
from twinkle_serve.engine.state_files import StateWriter, pack_state, read_state
from twinkle_serve.protocol.data import LoraSpec
from twinkle_serve.protocol.work import AdapterRef, OptimStep, PageOut, PersistRun, RestoreRun, Snapshot
from twinkle_serve.storage.checkpoints import CheckpointDamagedError, CheckpointMissingError, write_file

SPEC = LoraSpec(4, seed=3)


def state(seed: int, *, stepped: bool = True) -> AdapterState:
    generator = torch.Generator().manual_seed(seed)
    block = [torch.randn(4, 50, generator=generator) for _ in range(4)]
    return AdapterState(SPEC, *block, step=7) if stepped else AdapterState(SPEC, block[0])


def same(one: AdapterState, other: AdapterState) -> bool:
    def equal(a: torch.Tensor | None, b: torch.Tensor | None) -> bool:
        return a is b if a is None or b is None else torch.equal(a, b)

    names = ("weights", "grads", "exp_avg", "exp_avg_sq")
    blocks = all(equal(getattr(one, name), getattr(other, name)) for name in names)
    return blocks and (one.spec, one.step) == (other.spec, other.step)


@pytest.mark.parametrize("stepped", [True, False])
def test_a_state_comes_back_to_the_bit(tmp_path, stepped):
    before = state(1, stepped=stepped)
    (tmp_path / "file").write_bytes(pack_state(before))
    assert same(read_state(tmp_path / "file"), before)


@pytest.mark.parametrize("where", [3, 60, 400, -1])
def test_any_damage_is_noticed(tmp_path, where):
    data = bytearray(pack_state(state(1)))
    data[where] ^= 1
    (tmp_path / "file").write_bytes(data)
    with pytest.raises(CheckpointDamagedError):
        read_state(tmp_path / "file")
    (tmp_path / "file").write_bytes(data[:-5])
    with pytest.raises(CheckpointDamagedError):
        read_state(tmp_path / "file")
    with pytest.raises(CheckpointMissingError):
        read_state(tmp_path / "nothing")


def test_one_changed_byte_of_the_header_is_damage_or_nothing(tmp_path):
    """Never another error, which would end a group of ranks."""
    before = AdapterState(SPEC, torch.ones(4, 2), step=1)
    data = pack_state(before)
    path = tmp_path / "file"
    for where in range(8 + int.from_bytes(data[:8], "little")):
        for bits in (1, 4, 0x0F, 0x20, 0x80):
            path.write_bytes(data[:where] + bytes([data[where] ^ bits]) + data[where + 1 :])
            with contextlib.suppress(CheckpointDamagedError):
                assert same(read_state(path), before), (where, bits)


def test_the_writer_keeps_the_order_and_tells_what_went_wrong(tmp_path):
    (tmp_path / "file").touch()
    writer = StateWriter()
    writer.write(str(tmp_path / "a"), state(1))
    writer.write(str(tmp_path / "b"), state(2), "second")
    writer.write(str(tmp_path / "file" / "c"), state(3), "third")
    writer.close()
    second, third = writer.outcomes()
    assert (second.request_id, third.request_id) == ("second", "third")
    assert second.value == (tmp_path / "b").stat().st_size
    assert third.failure is not None
    assert third.failure.category == "server"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "file"]


def _persisted(engine: Engine, **fields) -> int:
    found = run(engine, **fields)
    while "persist" not in found:
        found = run(engine)
    size: int = value(found["persist"])
    return size


def _train(engine: Engine, slot: int) -> None:
    _, grads, _, _ = engine.pool.blocks(slot)
    grads += torch.linspace(-1, 1, grads.numel()).view_as(grads)
    engine.pool.has_grads[slot] = True
    value(run(engine, optim_steps=(OptimStep("optim", slot, ADAM),))["optim"])
    grads += 0.5
    engine.pool.has_grads[slot] = True


def test_a_restored_run_goes_on_as_if_nothing_had_happened(moe, tmp_path):
    path = str(tmp_path / "deep" / "state.safetensors")
    create_adapter(moe, 0, SPEC, moved=True)
    _train(moe, 0)
    size = _persisted(moe, persists=(PersistRun("persist", "run0", 0, path),))
    assert size == (tmp_path / "deep" / "state.safetensors").stat().st_size
    before = moe.pool.state(0)
    value(run(moe, restores=(RestoreRun("restore", "run0", 2, path),))["restore"])
    assert same(moe.pool.state(2), before)
    for slot in (0, 2):
        _train(moe, slot)
    assert same(moe.pool.state(2), moe.pool.state(0))
    assert not same(moe.pool.state(2), before)


def test_a_run_that_is_paged_out_is_persisted_too(moe, tmp_path):
    path = str(tmp_path / "state.safetensors")
    create_adapter(moe, 0, SPEC, moved=True)
    before = moe.pool.state(0)
    moves = {"page_out": (PageOut(0, "run0"),)}
    _persisted(moe, **moves, persists=(PersistRun("persist", "run0", None, path),))
    assert same(read_state(path), before)


def test_a_damaged_file_leaves_the_slot_free(moe, tmp_path):
    path = tmp_path / "state.safetensors"
    path.write_bytes(b"nonsense")
    outcome = run(moe, restores=(RestoreRun("restore", "run0", 1, str(path)),))["restore"]
    assert outcome.failure is not None
    assert outcome.failure.category == "user"
    assert not moe.pool.is_occupied(1)


@pytest.mark.parametrize(
    ("saved", "words"),
    [
        (AdapterState(LoraSpec(8), torch.zeros(8, 2464)), "rank 8; this server serves at most 4"),
        (AdapterState(LoraSpec(4), torch.zeros(4, 50)), "of this base model it would be [4, "),
        (None, "the directory of saved runs is not there"),
    ],
    ids=["rank", "layout", "directory"],
)
def test_a_run_that_does_not_fit_in_now_is_no_damaged_one(engine_for, tiny_moe, tmp_path, saved, words):
    """It will, once the configuration is as it was: what is kept of it has to stay."""
    path = tmp_path / "states" / "state.safetensors"
    if saved is not None:
        write_file(path, pack_state(saved))
    engine = engine_for(tiny_moe, max_rank=4)
    failure = run(engine, restores=(RestoreRun("restore", "run0", 1, str(path)),))["restore"].failure
    assert failure is not None
    assert failure.category == "server"
    assert words in failure.message
    assert not engine.pool.is_occupied(1)


def test_a_snapshot_can_be_sampled_from_its_file(moe, tmp_path):
    path = str(tmp_path / "snapshot.safetensors")
    create_adapter(moe, 0, SPEC, moved=True)
    run(moe, snapshots=(Snapshot("snapshot", 0, "frozen", path),))
    _persisted(moe, persists=(PersistRun("persist", "run0", 0, str(tmp_path / "state")),))
    found = moe._adapters.hold(AdapterRef("from the file", path))
    assert torch.equal(found.adapter.weights, moe.pool.blocks(0)[0])
    moe._adapters.let_go(found)
    run(moe, drop_snapshots=("frozen",))
