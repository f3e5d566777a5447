"""Passes of many runs: against Hugging Face and plain autograd, mixed against alone, and what goes wrong."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from tests.engine import reference
from tests.engine.conftest import EngineFactory
from tests.engine.ticks import (
    LOSSES,
    create,
    forward_backward,
    make_pass,
    optim_step,
    page_in,
    page_out,
    random_batch,
    run_passes,
    tensors,
    value,
)
from twinkle_serve.engine.engine import Engine
from twinkle_serve.protocol.data import Column, DatumBatch, ForwardResult, LoraSpec
from twinkle_serve.protocol.work import Outcome, Pass

FAMILIES = ["tiny_moe", "tiny_qwen3", "tiny_llama"]


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> Path:
    directory: Path = request.getfixturevalue(request.param)
    return directory


def assert_close(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], limit: float) -> None:
    """Each tensor within ``limit`` of its largest element (or of 1e-3 of the largest of all)."""
    assert found.keys() == expected.keys()
    largest = max(float(t.abs().max()) for t in expected.values())
    for key, tensor in expected.items():
        scale = max(float(tensor.abs().max()), 1e-3 * largest)
        assert float((found[key] - tensor).abs().max()) <= limit * scale, key


def test_fresh_adapter_is_the_untouched_model(family: Path, engine_for: EngineFactory) -> None:
    engine = engine_for(family)
    create(engine, 0, LoraSpec(rank=8, seed=1))
    batch = random_batch(np.random.default_rng(0), [7, 1, 12, 12])
    result = forward_backward(engine, 0, batch, backward=False)
    with torch.no_grad():
        expected = reference.target_logprobs(reference.plain(reference.load_model(family)), batch)
    np.testing.assert_allclose(result.logprobs.values, torch.cat(expected), atol=1e-4, rtol=0)


@pytest.mark.parametrize("loss", LOSSES)
def test_every_loss_by_value_and_gradient(loss: str, family: Path, engine_for: EngineFactory) -> None:
    engine = engine_for(family)
    create(engine, 2, LoraSpec(rank=5, seed=3), moved=True)
    batch = random_batch(np.random.default_rng(1), [6, 11, 3], loss)
    config = {"beta": 0.3} if loss == "dro" else {}
    result = forward_backward(engine, 2, batch, loss, config)
    dense = reference.DenseAdapter(reference.load_model(family), tensors(engine, 2))
    logprobs = reference.target_logprobs(dense.logits, batch)
    expected = reference.loss(loss, logprobs, batch, config)
    expected.backward()
    np.testing.assert_allclose(result.logprobs.values, torch.cat(logprobs).detach(), atol=2e-5, rtol=0)
    assert result.metrics["loss:sum"] == pytest.approx(expected.item(), rel=1e-5, abs=2e-5)
    assert_close(tensors(engine, 2, "grads"), dense.gradients(), 2e-5)


def test_many_targets_a_position(moe: Engine, tiny_moe: Path) -> None:
    create(moe, 0, LoraSpec(rank=3, seed=3), moved=True)
    batch = random_batch(np.random.default_rng(2), [6, 1, 3], k=4)
    result = forward_backward(moe, 0, batch)
    dense = reference.DenseAdapter(reference.load_model(tiny_moe), tensors(moe, 0))
    logprobs = reference.target_logprobs(dense.logits, batch)
    expected = reference.loss("cross_entropy", logprobs, batch, {})
    expected.backward()
    assert result.logprobs.widths.tolist() == [4, 4, 4]
    flat = torch.cat([lp.reshape(-1) for lp in logprobs]).detach()
    np.testing.assert_allclose(result.logprobs.values, flat, atol=2e-5, rtol=0)
    assert_close(tensors(moe, 0, "grads"), dense.gradients(), 2e-5)


def test_forward_leaves_no_trace(moe: Engine) -> None:
    create(moe, 0, LoraSpec(rank=4), moved=True)
    batch = random_batch(np.random.default_rng(3), [5, 9])
    forward_backward(moe, 0, batch)
    before = [block.clone() for block in moe.pool.blocks(0)]
    forward_backward(moe, 0, random_batch(np.random.default_rng(4), [8], "ppo"), "ppo", backward=False)
    assert all(torch.equal(a, b) for a, b in zip(moe.pool.blocks(0), before, strict=True))
    create(moe, 1, LoraSpec(rank=4), moved=True)
    forward_backward(moe, 1, batch, backward=False)
    assert not moe.pool.has_grads[1]
    assert not moe.pool.blocks(1)[1].any()


def test_gradients_add_up_over_calls_ticks_and_page_outs(moe: Engine, tiny_moe: Path) -> None:
    rng = np.random.default_rng(5)
    batches = [random_batch(rng, [4, 6]), random_batch(rng, [9], "ppo"), random_batch(rng, [3, 3])]
    losses = ["cross_entropy", "ppo", "cross_entropy"]
    create(moe, 0, LoraSpec(rank=4, seed=7), moved=True)
    create(moe, 1, LoraSpec(rank=8, seed=8), moved=True)
    dense = reference.DenseAdapter(reference.load_model(tiny_moe), tensors(moe, 0))
    for batch, loss in zip(batches, losses, strict=True):
        reference.loss(loss, reference.target_logprobs(dense.logits, batch), batch, {}).backward()

    passes = [make_pass(f"p{i}", 0, batches[i], losses[i]) for i in (0, 1)]
    run_passes(moe, passes)
    page_out(moe, 0, "run0")
    create(moe, 0, LoraSpec(rank=32), moved=True)  # another run works where ours was
    forward_backward(moe, 0, batches[1])
    forward_backward(moe, 1, batches[0])
    optim_step(moe, 1)
    page_in(moe, 3, "run0")
    forward_backward(moe, 3, batches[2])
    assert_close(tensors(moe, 3, "grads"), dense.gradients(), 2e-5)


def mixed_work(engine: Engine) -> list[Pass]:
    """Adapters of all sorts, and passes of all sorts on them, two of them on one run."""
    specs = [
        LoraSpec(1, seed=1),
        LoraSpec(32, seed=2, train_attn=False),
        LoraSpec(8, seed=3, train_unembed=False),
        LoraSpec(3, seed=4, train_mlp=False),
        LoraSpec(16, seed=5, train_attn=False, train_mlp=False),
    ]
    for slot, spec in enumerate(specs):
        if engine.pool.is_occupied(slot):
            engine.pool.free(slot)
        create(engine, slot, spec, moved=True)
    rng = np.random.default_rng(6)
    return [
        make_pass("a", 0, random_batch(rng, [5, 2, 5])),
        make_pass("b", 1, random_batch(rng, [9, 1], "ppo"), "ppo"),
        make_pass("c", 2, random_batch(rng, [4, 4], k=3)),
        make_pass("d", 2, random_batch(rng, [7], "gspo"), "gspo"),
        make_pass("e", 3, random_batch(rng, [6, 3], "dro"), "dro", {"beta": 0.2}),
        make_pass("f", 3, random_batch(rng, [8, 2], "cispo"), "cispo", backward=False),
        make_pass("g", 4, random_batch(rng, [2, 7], "importance_sampling"), "importance_sampling"),
    ]


def numbers(outcome: Outcome) -> tuple[np.ndarray, dict[str, float]]:
    result: ForwardResult = value(outcome)
    return np.asarray(result.logprobs.values), dict(result.metrics)


def test_a_mixed_microbatch_equals_each_pass_alone(moe: Engine) -> None:
    passes = mixed_work(moe)
    together = run_passes(moe, passes)
    grads = [moe.pool.blocks(slot)[1].clone() for slot in range(5)]
    mixed_work(moe)
    for item in passes:
        alone = run_passes(moe, [item])[item.request_id]
        logprobs, metrics = numbers(together[item.request_id])
        np.testing.assert_allclose(logprobs, numbers(alone)[0], rtol=1e-6)
        assert metrics == pytest.approx(numbers(alone)[1], rel=1e-6, abs=1e-5)
    for slot, grad in enumerate(grads):
        expected = moe.pool.blocks(slot)[1]
        assert float((grad - expected).norm()) <= 1e-6 * float(expected.norm())


def test_deterministic_mode_is_bitwise_each_pass_alone(deterministic_moe: Engine) -> None:
    engine = deterministic_moe
    passes = mixed_work(engine)
    together = run_passes(engine, passes, tokens=8)  # small microbatches: several of each pass
    grads = [engine.pool.blocks(slot)[1].clone() for slot in range(5)]
    mixed_work(engine)
    for item in passes:
        alone = run_passes(engine, [item], tokens=8)[item.request_id]
        assert numbers(together[item.request_id])[0].tobytes() == numbers(alone)[0].tobytes()
        assert numbers(together[item.request_id])[1] == numbers(alone)[1]
    assert all(torch.equal(grad, engine.pool.blocks(slot)[1]) for slot, grad in enumerate(grads))


def with_column(batch: DatumBatch, name: str, position: int, number: float) -> DatumBatch:
    values = batch.columns[name].values.copy()
    values[position] = number
    return DatumBatch(
        batch.tokens, batch.lengths, {**batch.columns, name: Column(values, batch.columns[name].widths)}
    )


BAD = {
    "weights beyond float32's squares": ("cross_entropy", "weights", 1e38),
    "infinite weights": ("cross_entropy", "weights", np.inf),
    "nan weights": ("cross_entropy", "weights", np.nan),
    "an overflowing ratio": ("importance_sampling", "logprobs", -200.0),
    "a ratio that barely fits": ("importance_sampling", "logprobs", -93.0),
    "nan advantages": ("ppo", "advantages", np.nan),
}


@pytest.mark.parametrize("which", BAD)
@pytest.mark.parametrize("tokens", [4096, 8])  # all in one microbatch, or the bad datum in its pass's second
def test_a_request_that_is_not_finite_fails_alone(which: str, tokens: int, deterministic_moe: Engine) -> None:
    engine = deterministic_moe
    loss, column, number = BAD[which]
    rng = np.random.default_rng(7)
    for slot in (0, 1):
        create(engine, slot, LoraSpec(rank=4, seed=slot), moved=True)
        forward_backward(engine, slot, random_batch(rng, [6]))
    bad = with_column(random_batch(rng, [4, 7], loss), column, 6, number)
    neighbour, sibling = random_batch(rng, [5, 3]), random_batch(rng, [2, 6])

    def others() -> list[Pass]:
        return [make_pass("sibling", 0, sibling), make_pass("neighbour", 1, neighbour)]

    start = engine.pool.grads.clone()
    expected = run_passes(engine, others(), tokens=tokens)
    expected_grads = engine.pool.grads.clone()
    engine.pool.grads.copy_(start)
    found = run_passes(engine, [make_pass("bad", 0, bad, loss), *others()], tokens=tokens)

    failure = found["bad"].failure
    assert failure is not None
    assert failure.category == "user"
    assert "data[" in failure.message
    assert torch.equal(engine.pool.grads, expected_grads)
    for name in ("sibling", "neighbour"):
        assert numbers(found[name])[0].tobytes() == numbers(expected[name])[0].tobytes()


def test_a_request_that_is_not_finite_fails_alone_in_a_shared_microbatch(moe: Engine) -> None:
    rng = np.random.default_rng(8)
    for slot in (0, 1, 2):
        create(moe, slot, LoraSpec(rank=4, seed=slot), moved=True)
    forward_backward(moe, 1, random_batch(rng, [6]))
    before = moe.pool.blocks(1)[1].clone()
    good = [make_pass("a", 0, random_batch(rng, [5, 3])), make_pass("c", 2, random_batch(rng, [4]))]
    bad = make_pass("b", 1, with_column(random_batch(rng, [4]), "weights", 0, 1e38))
    found = run_passes(moe, [good[0], bad, good[1]])
    assert found["b"].failure is not None
    assert torch.equal(moe.pool.blocks(1)[1], before)
    grads = [moe.pool.blocks(slot)[1].clone() for slot in (0, 2)]
    moe.pool.grads.zero_()
    run_passes(moe, good)
    for slot, grad in zip((0, 2), grads, strict=True):
        torch.testing.assert_close(grad, moe.pool.blocks(slot)[1], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("shared", [True, False])
def test_a_diverged_adapter_fails_alone_and_keeps_its_gradients(shared: bool, moe: Engine) -> None:
    rng = np.random.default_rng(9)
    for slot in (0, 1):
        create(moe, slot, LoraSpec(rank=4, seed=slot), moved=True)
    forward_backward(moe, 0, random_batch(rng, [6]))
    before = moe.pool.blocks(0)[1].clone()
    moe.pool.blocks(0)[0].mul_(1e30)
    good = make_pass("good", 1, random_batch(rng, [5, 3]))
    bad = make_pass("bad", 0, random_batch(rng, [4]))
    found = run_passes(moe, [bad, good] if shared else [bad])
    failure = found["bad"].failure
    assert failure is not None
    assert "diverged" in failure.message
    assert torch.equal(moe.pool.blocks(0)[1], before)
    if shared:
        assert np.isfinite(numbers(found["good"])[0]).all()
        assert torch.isfinite(moe.pool.blocks(1)[1]).all()


class SmallMemory:
    """A base model that runs out of memory when more than ``rows`` rows run at once; counts its runs."""

    def __init__(self, engine: Engine, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
        self.sizes: list[int] = []
        model, forward = engine.base.model.base_model, engine.base.model.base_model.forward

        def limited(*args: object, **kwargs: torch.Tensor) -> object:
            num_rows = kwargs["inputs_embeds"].shape[1]
            self.sizes.append(num_rows)
            if num_rows > rows:
                raise torch.OutOfMemoryError("planted")
            return forward(*args, **kwargs)

        monkeypatch.setattr(model, "forward", limited)


def test_out_of_memory_is_split_and_retried(moe: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    passes = mixed_work(moe)
    expected = run_passes(moe, passes)
    grads = [moe.pool.blocks(slot)[1].clone() for slot in range(5)]
    mixed_work(moe)
    memory = SmallMemory(moe, 12, monkeypatch)
    found = run_passes(moe, passes)
    assert max(memory.sizes) > 12
    for name in expected:
        np.testing.assert_allclose(numbers(found[name])[0], numbers(expected[name])[0], rtol=2e-6)
        assert numbers(found[name])[1] == pytest.approx(numbers(expected[name])[1], rel=1e-6, abs=1e-5)
    for slot, grad in enumerate(grads):
        assert float((grad - moe.pool.blocks(slot)[1]).norm()) <= 1e-6 * float(grad.norm())


def test_one_datum_that_does_not_fit_fails_alone(moe: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(10)
    for slot in (0, 1):
        create(moe, slot, LoraSpec(rank=4, seed=slot), moved=True)
    first = random_batch(rng, [3])
    forward_backward(moe, 0, first)
    before = moe.pool.blocks(0)[1].clone()
    SmallMemory(moe, 10, monkeypatch)
    passes = [
        make_pass("big", 0, random_batch(rng, [4, 11, 5])),
        make_pass("good", 1, random_batch(rng, [6, 6])),
        make_pass("look", 0, random_batch(rng, [6]), backward=False),
    ]
    found = run_passes(moe, passes)
    failure = found["big"].failure
    assert failure is not None
    assert failure.category == "user"
    assert "memory" in failure.message
    assert torch.equal(moe.pool.blocks(0)[1], before)
    assert found["good"].failure is None
    assert found["look"].failure is None
    monkeypatch.undo()
    grads = moe.pool.blocks(1)[1].clone()
    moe.pool.grads.zero_()
    run_passes(moe, passes[1:2])
    torch.testing.assert_close(grads, moe.pool.blocks(1)[1], rtol=1e-5, atol=1e-6)


def test_out_of_memory_in_the_middle_of_backward_leaves_nothing_behind(
    moe: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The head's gradients are in the slots when the layers below fail."""
    passes = mixed_work(moe)
    expected = run_passes(moe, passes)
    grads = [moe.pool.blocks(slot)[1].clone() for slot in range(5)]
    mixed_work(moe)
    real, calls = torch.autograd.backward, []

    def failing(tensor: torch.Tensor, gradient: torch.Tensor) -> None:
        real(tensor, gradient)
        calls.append(len(gradient))
        if len(calls) == 1:
            raise torch.OutOfMemoryError("planted")

    monkeypatch.setattr(torch.autograd, "backward", failing)
    found = run_passes(moe, passes)
    assert len(calls) > 1
    assert all(outcome.failure is None for outcome in found.values())
    assert expected.keys() == found.keys()
    for slot, grad in enumerate(grads):
        assert float((grad - moe.pool.blocks(slot)[1]).norm()) <= 1e-6 * float(grad.norm())


def test_without_memory_for_a_copy_of_gradients_the_copy_is_kept_on_the_host(
    moe: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = np.random.default_rng(12)
    create(moe, 0, LoraSpec(rank=4), moved=True)
    forward_backward(moe, 0, random_batch(rng, [6]))
    before = moe.pool.blocks(0)[1].clone()
    good, bad = random_batch(rng, [4, 2]), with_column(random_batch(rng, [4]), "weights", 0, np.nan)
    real, calls = torch.Tensor.clone, []

    def failing(tensor: torch.Tensor, **options: object) -> torch.Tensor:
        if tensor.shape == before.shape and not calls:
            calls.append(tensor)
            raise torch.OutOfMemoryError("planted")
        return real(tensor, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(torch.Tensor, "clone", failing)
    found = run_passes(moe, [make_pass("bad", 0, bad)])
    assert calls
    assert found["bad"].failure is not None
    assert torch.equal(moe.pool.blocks(0)[1], before)
    calls.clear()
    assert run_passes(moe, [make_pass("good", 0, good)])["good"].failure is None
    assert calls
    assert not torch.equal(moe.pool.blocks(0)[1], before)


def test_a_bug_in_one_request_is_a_server_error_of_that_request(
    moe: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    from twinkle_serve.engine import share

    for slot in (0, 1):
        create(moe, slot, LoraSpec(rank=4, seed=slot), moved=True)
    real = share.compute_loss

    def buggy(name: str, *args: object) -> object:
        if name == "dro":
            raise IndexError("planted")
        return real(name, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(share, "compute_loss", buggy)
    rng = np.random.default_rng(11)
    good, bad = random_batch(rng, [4, 2]), random_batch(rng, [5], "dro")
    found = run_passes(moe, [make_pass("good", 0, good), make_pass("bad", 1, bad, "dro")])
    assert found["good"].failure is None
    failure = found["bad"].failure
    assert failure is not None
    assert failure.category == "server"
    assert "planted" not in failure.message
    assert not moe.pool.blocks(1)[1].any()
    assert moe.pool.blocks(0)[1].any()


def test_activation_checkpointing_gives_the_same_gradients(
    engine_for: EngineFactory, moe: Engine, tiny_moe: Path
) -> None:
    frugal = engine_for(tiny_moe, activation_checkpointing=True)
    passes = mixed_work(moe)
    expected = run_passes(moe, passes)
    mixed_work(frugal)
    found = run_passes(frugal, passes)
    for name in expected:
        np.testing.assert_array_equal(numbers(found[name])[0], numbers(expected[name])[0])
    for slot in range(5):
        assert torch.equal(moe.pool.blocks(slot)[1], frugal.pool.blocks(slot)[1])
