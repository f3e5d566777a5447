"""The tick: the order of its fields, what each answers, and that an error stays where it is."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.engine.conftest import EngineFactory
from tests.engine.ticks import (
    ADAM,
    create,
    forward_backward,
    make_pass,
    make_sample,
    optim_step,
    page_in,
    page_out,
    random_batch,
    run,
    sample,
    snapshot,
    value,
)
from twinkle_serve.config import ModelConfig
from twinkle_serve.engine.engine import Engine
from twinkle_serve.engine.slots import initialize
from twinkle_serve.protocol.data import DatumBatch, LoraSpec
from twinkle_serve.protocol.work import (
    AdapterRef,
    CreateAdapter,
    DropRun,
    LoadAdapter,
    OptimStep,
    Outcome,
    PageIn,
    PageOut,
    Piece,
    SaveAdapter,
    Snapshot,
    Tick,
    TickReport,
)


def batch_of(seed: int, *lengths: int) -> DatumBatch:
    return random_batch(np.random.default_rng(seed), lengths)


def blocks(engine: Engine, slot: int) -> list[torch.Tensor]:
    return [block.clone() for block in engine.pool.blocks(slot)]


def same(one: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_a_tick_does_everything_in_the_order_of_its_fields(moe: Engine, tmp_path: Path) -> None:
    """A checkpoint into slot 0, then a pass, a step, a save and a snapshot of it, and a sample of that."""
    create(moe, 0, LoraSpec(rank=4, seed=1), moved=True)
    saved = SaveAdapter("save", 0, str(tmp_path / "start"), True, {})
    value(run(moe, saves=(saved,))["save"])
    batch = batch_of(1, 5, 3)
    forward_backward(moe, 0, batch)
    optim_step(moe, 0)
    expected = blocks(moe, 0)
    moe.pool.free(0)

    tick = Tick(
        7,
        creates=(CreateAdapter("create", "run", 0, LoraSpec(rank=4, seed=9)),),
        loads=(LoadAdapter("load", "run", 0, str(tmp_path / "start"), True),),
        passes=(make_pass("pass", 0, batch),),
        microbatches=((Piece(0, (0, 1)),),),
        optim_steps=(OptimStep("optim", 0, ADAM),),
        saves=(SaveAdapter("save", 0, str(tmp_path / "end"), True, {}),),
        snapshots=(Snapshot("snapshot", 0, "after-the-step"),),
        samples=(make_sample("sample", [1, 2], AdapterRef("after-the-step"), max_tokens=3, seed=1),),
        decode_budget_s=60.0,
    )
    *outcomes, report = list(moe.run(tick))
    names = [outcome.request_id for outcome in outcomes if isinstance(outcome, Outcome)]
    assert names == ["create", "load", "pass", "optim", "save", "snapshot", "sample"]
    assert all(isinstance(o, Outcome) and o.failure is None for o in outcomes)
    assert same(blocks(moe, 0), expected)
    value(run(moe, loads=(LoadAdapter("l", "other", 1, str(tmp_path / "end"), True),))["l"])
    assert same(blocks(moe, 1), expected)

    assert isinstance(report, TickReport)
    assert (report.tick_id, report.active_samples) == (7, 0)
    assert set(report.seconds) == {"move", "passes", "optim", "save", "sample"}
    assert all(seconds >= 0 for seconds in report.seconds.values())


def test_an_empty_tick_is_a_report(moe: Engine) -> None:
    (report,) = moe.run(Tick(3))
    assert isinstance(report, TickReport)
    assert report.tick_id == 3


@pytest.mark.parametrize("host_bytes", [0, 2**30], ids=["disk", "host"])
def test_a_run_comes_back_from_its_page_as_it_left(
    host_bytes: int, engine_for: EngineFactory, tiny_moe: Path
) -> None:
    engine = engine_for(tiny_moe, host_page_bytes=host_bytes)
    spec = LoraSpec(rank=4, seed=1, train_attn=False)
    create(engine, 0, spec, moved=True)
    forward_backward(engine, 0, batch_of(1, 5))
    optim_step(engine, 0)
    forward_backward(engine, 0, batch_of(2, 5))
    before = blocks(engine, 0)
    page_out(engine, 0, "run0")
    assert not engine.pool.is_occupied(0)
    report = list(engine.run(Tick(1)))[-1]
    assert isinstance(report, TickReport)
    held = {name: report.gauges[name] > 0 for name in ("paged_host_bytes", "paged_disk_bytes")}
    assert held == {"paged_host_bytes": host_bytes > 0, "paged_disk_bytes": host_bytes == 0}
    page_in(engine, 5, "run0")
    assert same(blocks(engine, 5), before)
    assert engine.pool.adapter(5).spec == spec
    assert (engine.pool.steps[5], engine.pool.has_grads[5]) == (1, True)


def test_one_tick_swaps_two_runs(moe: Engine) -> None:
    create(moe, 0, LoraSpec(rank=4, seed=1), moved=True)
    create(moe, 1, LoraSpec(rank=32, seed=2), moved=True)
    one, two = blocks(moe, 0), blocks(moe, 1)
    run(
        moe,
        page_out=(PageOut(0, "one"), PageOut(1, "two")),
        page_in=(PageIn(1, "one"), PageIn(0, "two")),
    )
    assert same(blocks(moe, 1), one)
    assert same(blocks(moe, 0), two)


def test_a_new_run_is_pristine_where_another_was(moe: Engine) -> None:
    create(moe, 0, LoraSpec(rank=32, seed=1), moved=True)
    forward_backward(moe, 0, batch_of(1, 9))
    optim_step(moe, 0)
    forward_backward(moe, 0, batch_of(1, 9))
    spec = LoraSpec(rank=5, seed=3)
    run(moe, drops=(DropRun("old", 0),), creates=(CreateAdapter("c", "new", 0, spec),))
    fresh = torch.zeros(5, moe.base.layout.row_size)
    initialize(moe.base.layout, spec, fresh)
    assert torch.equal(moe.pool.weights[0, :5], fresh)
    assert not moe.pool.weights[0, 5:].any()
    assert not any(t[0].any() for t in (moe.pool.grads, moe.pool.exp_avg, moe.pool.exp_avg_sq))
    assert (moe.pool.steps[0], moe.pool.has_grads[0]) == (0, False)


def test_dropping_a_paged_run_forgets_its_page(moe: Engine) -> None:
    create(moe, 0, LoraSpec(rank=4, seed=1))
    page_out(moe, 0, "run0")
    run(moe, drops=(DropRun("run0", None),))
    report = list(moe.run(Tick(1)))[-1]
    assert isinstance(report, TickReport)
    assert report.gauges["paged_host_bytes"] == 0
    with pytest.raises(KeyError):
        page_in(moe, 0, "run0")


def test_an_error_in_one_item_does_not_stop_the_others(moe: Engine, tmp_path: Path) -> None:
    create(moe, 0, LoraSpec(rank=4, seed=1), moved=True)
    create(moe, 1, LoraSpec(rank=4, seed=2), moved=True)
    moe.pool.blocks(1)[1].fill_(float("nan"))
    before = blocks(moe, 1)[0]
    found = run(
        moe,
        creates=(
            CreateAdapter("taken", "x", 0, LoraSpec(rank=4)),
            CreateAdapter("fine", "y", 2, LoraSpec(rank=4)),
        ),
        loads=(LoadAdapter("nowhere", "y", 2, str(tmp_path / "nowhere"), True),),
        optim_steps=(OptimStep("nan", 1, ADAM), OptimStep("idle", 2, ADAM), OptimStep("ok", 0, ADAM)),
        saves=(SaveAdapter("saved", 0, str(tmp_path / "c"), True, {}),),
    )
    failed = {name: outcome.failure.category for name, outcome in found.items() if outcome.failure}
    assert failed == {"taken": "server", "nowhere": "user", "nan": "user"}
    assert torch.equal(moe.pool.blocks(1)[0], before)
    assert not moe.pool.blocks(1)[1].any()  # discarded, so the run can go on
    assert isinstance(value(found["saved"]), int)
    assert value(found["idle"])["grad_norm"] == 0.0


def test_requests_of_a_slot_with_nothing_in_it_fail_alone(moe: Engine) -> None:
    create(moe, 0, LoraSpec(rank=4, seed=1))
    found = run(
        moe,
        passes=(make_pass("nobody's", 1, batch_of(1, 4)), make_pass("pass", 0, batch_of(2, 3))),
        microbatches=((Piece(0, (0,)), Piece(1, (0,))),),
        optim_steps=(OptimStep("nobody's step", 1, ADAM), OptimStep("step", 0, ADAM)),
    )
    for name in ("nobody's", "nobody's step"):
        failure = found[name].failure
        assert failure is not None
        assert "no adapter" in failure.message
    assert found["pass"].failure is None
    assert value(found["step"])["grad_norm"] > 0


def test_steps_of_several_runs_are_each_their_own(moe: Engine) -> None:
    for slot in (0, 1, 2):
        create(moe, slot, LoraSpec(rank=2 + slot, seed=slot), moved=True)
        forward_backward(moe, slot, batch_of(slot, 6))
    before = [blocks(moe, slot) for slot in range(3)]
    steps = tuple(OptimStep(f"{slot}", slot, ADAM) for slot in (2, 0))
    found = run(moe, optim_steps=steps)
    assert set(found) == {"0", "2"}
    assert same(blocks(moe, 1), before[1])
    for slot in (0, 2):
        together = blocks(moe, slot)
        for block, old in zip(moe.pool.blocks(slot), before[slot], strict=True):
            block.copy_(old)
        moe.pool.steps[slot] = 0
        assert optim_step(moe, slot) == value(found[f"{slot}"])
        assert same(blocks(moe, slot), together)


def test_on_a_bfloat16_base_every_change_of_the_weights_is_seen(
    engine_for: EngineFactory, tiny_moe: Path, tmp_path: Path
) -> None:
    """The weights are float32, what the products read is a copy; a page-in always makes a new one."""
    engine = engine_for(tiny_moe, dtype="bfloat16")

    def logprobs() -> list[float]:
        before = forward_backward(engine, 0, batch_of(1, 6), backward=False).logprobs.values.tolist()
        page_out(engine, 0, "run0")
        page_in(engine, 0, "run0")
        after = forward_backward(engine, 0, batch_of(1, 6), backward=False).logprobs.values.tolist()
        assert before == after
        return before

    seen = []
    create(engine, 0, LoraSpec(rank=4, seed=1))
    for _ in range(3):
        seen.append(logprobs())
        forward_backward(engine, 0, batch_of(2, 6))
        optim_step(engine, 0)
    value(run(engine, saves=(SaveAdapter("s", 0, str(tmp_path / "c"), True, {}),))["s"])
    seen.append(logprobs())
    forward_backward(engine, 0, batch_of(2, 6))
    optim_step(engine, 0)
    seen.append(logprobs())
    assert len({tuple(found) for found in seen}) == 5
    value(run(engine, loads=(LoadAdapter("l", "run0", 0, str(tmp_path / "c"), True),))["l"])
    assert logprobs() == seen[3]


def test_sampling_from_a_checkpoint_is_sampling_from_its_weights(moe: Engine, tmp_path: Path) -> None:
    create(moe, 0, LoraSpec(rank=4, seed=1), moved=True)
    value(run(moe, saves=(SaveAdapter("s", 0, str(tmp_path / "c"), False, {}),))["s"])
    from_disk = sample(moe, [1, 2], AdapterRef("checkpoint", str(tmp_path / "c")), max_tokens=5, seed=1)
    from_slot = sample(moe, [1, 2], snapshot(moe, 0, "slot"), max_tokens=5, seed=1)
    assert from_disk.sequences[0].logprobs.tolist() == from_slot.sequences[0].logprobs.tolist()


def test_probe_says_whether_the_model_works(moe: Engine) -> None:
    assert moe.probe()
    embedding = moe.base.model.get_input_embeddings().weight
    row = embedding[0].clone()
    with torch.no_grad():
        embedding[0] = float("nan")
        try:
            assert not moe.probe()
        finally:
            embedding[0] = row
    assert moe.probe()


def test_a_probe_between_ticks_changes_nothing(moe: Engine) -> None:
    create(moe, 0, LoraSpec(rank=4, seed=1), moved=True)
    expected = forward_backward(moe, 0, batch_of(1, 5), backward=False).logprobs.values
    moe.probe()
    found = forward_backward(moe, 0, batch_of(1, 5), backward=False).logprobs.values
    np.testing.assert_array_equal(found, expected)


@pytest.fixture
def short_lived(tiny_llama: Path) -> Iterator[Engine]:
    engine = Engine(ModelConfig(name="tiny", path=str(tiny_llama), num_threads=1, host_page_bytes=0))
    yield engine
    engine.close()


def test_closing_removes_the_pages(short_lived: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    create(short_lived, 0, LoraSpec(rank=4))
    page_out(short_lived, 0, "run0")
    scratch = short_lived._owned_scratch
    assert scratch is not None
    assert list(scratch.rglob("*.safetensors"))
    short_lived.close()
    assert not scratch.exists()


def test_a_scratch_directory_of_the_caller_s_is_the_caller_s(tiny_llama: Path, tmp_path: Path) -> None:
    config = ModelConfig(name="tiny", path=str(tiny_llama), num_threads=1, host_page_bytes=0)
    engine = Engine(config, tmp_path)
    create(engine, 0, LoraSpec(rank=4))
    page_out(engine, 0, "run0")
    engine.close()
    assert list(tmp_path.rglob("*.safetensors"))


def test_a_model_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere"):
        Engine(ModelConfig(name="m", path=str(tmp_path / "nowhere")))


def test_a_run_comes_back_though_there_was_no_disk_for_its_page(tiny_llama: Path, tmp_path: Path) -> None:
    (tmp_path / "runs").write_text("a file where the pages should be")
    config = ModelConfig(name="tiny", path=str(tiny_llama), num_threads=1, host_page_bytes=0)
    engine = Engine(config, tmp_path)
    create(engine, 0, LoraSpec(rank=4, seed=1), moved=True)
    forward_backward(engine, 0, batch_of(1, 5))
    before = blocks(engine, 0)
    page_out(engine, 0, "run0")
    assert not engine.pool.is_occupied(0)
    page_in(engine, 1, "run0")
    assert same(blocks(engine, 1), before)
    engine.close()


def test_a_checkpoint_of_a_rank_that_is_not_served_is_refused_by_name(
    moe: Engine, engine_for: EngineFactory, tiny_moe: Path, tmp_path: Path
) -> None:
    create(moe, 0, LoraSpec(rank=8, seed=1), moved=True)
    value(run(moe, saves=(SaveAdapter("s", 0, str(tmp_path / "c"), True, {}),))["s"])
    smaller = engine_for(tiny_moe, max_rank=4)
    failure = run(smaller, loads=(LoadAdapter("l", "run", 0, str(tmp_path / "c"), True),))["l"].failure
    assert failure is not None
    assert (failure.category, failure.message) == ("user", "rank 8; this server serves at most 4")
    assert not smaller.pool.is_occupied(0)


def test_a_lost_device_ends_the_rank_and_nobody_hears_that_it_failed(
    moe: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    create(moe, 0, LoraSpec(rank=4, seed=1), moved=True)
    before = moe.pool.state(0)

    def lost(*_: object, **__: object) -> None:
        raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")

    with monkeypatch.context() as patched:
        patched.setattr(moe.base.model.base_model, "forward", lost)
        patched.setattr(moe.pool, "clear_grads", lost)
        patched.setattr(moe.pool, "state", lost)
        ticks: list[dict[str, Any]] = [
            {"passes": (make_pass("pass", 0, batch_of(1, 5)),), "microbatches": ((Piece(0, (0,)),),)},
            {"saves": (SaveAdapter("save", 0, str(tmp_path / "c"), True, {}),)},
        ]
        for fields in ticks:
            outcomes: list[object] = []
            with pytest.raises(torch.AcceleratorError):
                outcomes.extend(moe.run(Tick(1, **fields)))
            assert outcomes == []
    assert torch.equal(moe.pool.state(0).weights, before.weights)
