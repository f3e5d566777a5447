"""The engine on a GPU in bfloat16: against float32 on the CPU, alone and among others, sampled and saved.

Skipped where there is no GPU, which is where CI runs.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from tests.engine.conftest import EngineFactory
from tests.engine.ticks import (
    ADAM,
    create,
    forward_backward,
    make_pass,
    random_batch,
    run,
    run_passes,
    sample,
    snapshot,
    tensors,
    value,
)
from twinkle_serve.engine.engine import Engine
from twinkle_serve.protocol.data import LoraSpec
from twinkle_serve.protocol.work import OptimStep, PageIn, PageOut
from twinkle_serve.testing.models import build_tiny_qwen3_moe

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

SPECS = [LoraSpec(3, 1), LoraSpec(8, 2, train_attn=False), LoraSpec(32, 3, train_mlp=False), LoraSpec(16, 4)]
LENGTHS = [5, 90, 17, 17, 1]


@pytest.fixture(scope="module")
def model(models_root: Path) -> Path:
    return build_tiny_qwen3_moe(
        models_root, hidden_size=256, num_layers=3, num_experts=8, expert_size=64, num_experts_per_token=2
    )


def with_runs(engine: Engine) -> Engine:
    """B is small: a random mixture of experts that is far from its base routes some tokens elsewhere for a
    rounding, and says nothing about products."""
    for slot, spec in enumerate(SPECS):
        create(engine, slot, spec, moved=True)
        state = engine.pool.state(slot)
        for target in engine.base.layout.targets:
            engine.base.layout.b_t(state.weights, target).mul_(0.05)
        engine.pool.free(slot)
        engine.pool.put(slot, state)
    return engine


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm().clamp(min=1e-12))


def test_bfloat16_on_the_gpu_is_near_float32_on_the_cpu(engine_for: EngineFactory, model: Path) -> None:
    generator = np.random.default_rng(0)
    batches = [random_batch(generator, LENGTHS) for _ in SPECS]
    passes = [make_pass(f"{slot}", slot, batch) for slot, batch in enumerate(batches)]
    results = []
    for place in ({"device": "cpu"}, {"device": "cuda", "dtype": "bfloat16"}):
        engine = with_runs(engine_for(model, **place))
        outcomes = run_passes(engine, passes)
        logprobs = [torch.from_numpy(value(outcomes[f"{slot}"]).logprobs.values.copy()) for slot in range(4)]
        results.append((logprobs, [tensors(engine, slot, "grads") for slot in range(4)]))
    (expected, gradients), (found, found_gradients) = results
    for slot in range(4):
        assert relative(found[slot], expected[slot]) < 2e-2
        whole = torch.cat([gradients[slot][key].flatten() for key in gradients[slot]])
        ours = torch.cat([found_gradients[slot][key].flatten() for key in gradients[slot]]).cpu()
        assert relative(ours, whole.cpu()) < 0.25, SPECS[slot]


def test_a_run_among_others_is_what_it_is_alone(engine_for: EngineFactory, model: Path) -> None:
    engine = with_runs(engine_for(model, device="cuda", dtype="bfloat16"))
    generator = np.random.default_rng(1)
    batches = [random_batch(generator, LENGTHS) for _ in SPECS]
    together = run_passes(engine, [make_pass(f"{slot}", slot, b) for slot, b in enumerate(batches)])
    gradients = [tensors(engine, slot, "grads") for slot in range(4)]
    for slot, batch in enumerate(batches):
        engine.pool.clear_grads(slot)
        alone = forward_backward(engine, slot, batch)
        expected = torch.from_numpy(alone.logprobs.values.copy())
        assert relative(torch.from_numpy(value(together[f"{slot}"]).logprobs.values.copy()), expected) < 1e-2
        mine = torch.cat([g.flatten() for g in gradients[slot].values()])
        assert (
            relative(mine, torch.cat([g.flatten() for g in tensors(engine, slot, "grads").values()])) < 2e-2
        )


def test_samples_have_the_logprobs_of_the_trainer(engine_for: EngineFactory, model: Path) -> None:
    engine = with_runs(engine_for(model, device="cuda", dtype="bfloat16"))
    for slot in (0, 3):
        ref = snapshot(engine, slot, f"gpu-{slot}")
        prompt = [5, 6, 7, 8, 9]
        (drawn,) = sample(engine, prompt, ref, max_tokens=24, temperature=1.0, seed=3).sequences
        tokens = np.array([*prompt, *drawn.tokens.tolist()], np.int32)
        batch = random_batch(np.random.default_rng(0), [len(tokens) - 1])
        batch.tokens[:] = tokens[:-1]
        batch.columns["target_tokens"].values[:] = tokens[1:]
        trained = forward_backward(engine, slot, batch, backward=False).logprobs.values[len(prompt) - 1 :]
        assert np.abs(trained - np.array(drawn.logprobs)).mean() < 0.1


def test_a_step_moves_only_its_run_and_paging_gives_back_the_same_bits(
    engine_for: EngineFactory, model: Path
) -> None:
    engine = with_runs(engine_for(model, device="cuda", dtype="bfloat16"))
    forward_backward(engine, 0, random_batch(np.random.default_rng(2), LENGTHS))
    others = [tensors(engine, slot) for slot in (1, 2, 3)]
    value(run(engine, optim_steps=(OptimStep("step", 0, ADAM),))["step"])
    for slot, expected in zip((1, 2, 3), others, strict=True):
        assert all(torch.equal(tensors(engine, slot)[key], tensor) for key, tensor in expected.items())
    before = engine.pool.state(0)
    run(engine, page_out=(PageOut(0, "run0"),))
    run(engine, page_in=(PageIn(0, "run0"),))
    after = engine.pool.state(0)
    assert torch.equal(before.weights, after.weights)
    assert before.exp_avg is not None
    assert after.exp_avg is not None
    assert torch.equal(before.exp_avg, after.exp_avg)
