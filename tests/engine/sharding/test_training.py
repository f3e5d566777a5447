"""Two ranks train as one does, with either way of sharing the model: answers, gradients, steps, failures."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.engine.sharding import remote
from tests.engine.sharding.compare import Both, passes
from tests.engine.sharding.conftest import BothFactory
from tests.engine.ticks import make_sample, random_batch
from twinkle_serve.protocol.data import AdamParams, Column, DatumBatch, LoraSpec
from twinkle_serve.protocol.work import OptimStep, PageIn, PageOut

SPECS = [LoraSpec(4, 1), LoraSpec(8, 2, train_unembed=False), LoraSpec(3, 3, train_mlp=False)]
LOSSES = ["cross_entropy", "ppo", "importance_sampling"]
# eps: without it the first steps turn the rounding of tiny gradients into whole steps.
ADAM = AdamParams(learning_rate=1e-2, eps=1e-4)
CLIPPED = AdamParams(learning_rate=1e-2, eps=1e-4, grad_clip_norm=0.5, weight_decay=0.1)
ways = pytest.mark.parametrize("sharding", ["expert_parallel", "zero3"])


def work(seed: int, lengths: list[list[int]]) -> list[tuple[int, DatumBatch, str]]:
    rng = np.random.default_rng(seed)
    return [(i, random_batch(rng, n, LOSSES[i]), LOSSES[i]) for i, n in enumerate(lengths)]


def step_all(both: Both, params: AdamParams = ADAM) -> None:
    both.run(optim_steps=tuple(OptimStep(f"o{slot}", slot, params) for slot in range(len(SPECS))))


@ways
def test_a_fresh_adapter_is_the_same(both: BothFactory, sharding: str) -> None:
    pair = both(sharding)
    spec = LoraSpec(5, 7)
    pair.one.pool.create(2, spec)
    pair.crew.run(remote.create, pair.config, 2, spec)
    assert torch.equal(pair.state(2).weights, pair.one.pool.state(2).weights)


@ways
@pytest.mark.parametrize("checkpointing", [False, True])
def test_mixed_tenants_ranks_and_losses(both: BothFactory, sharding: str, checkpointing: bool) -> None:
    pair = both(sharding, activation_checkpointing=checkpointing)
    pair.create(SPECS)
    uneven = work(1, [[9, 2, 31, 4], [17], [3, 3, 8]])
    pair.run(**passes(uneven, tokens=40))
    pair.assert_same_slots(range(3))
    step_all(pair)
    pair.run(**passes(uneven))
    pair.run(**passes(work(2, [[1], [2, 3]])))  # summed once for the step, not for each pass
    step_all(pair, CLIPPED)
    pair.run(**passes(work(3, [[5, 6]])))
    pair.assert_same_slots([0])
    for slot in (1, 2):
        assert pair.state(slot).grads is None


def test_all_to_all_does_the_same(both: BothFactory) -> None:
    """With checkpointing, which sends everything again, and with a rank that has a row of its own only."""
    pair = both("expert_parallel", expert_dispatch="all_to_all", activation_checkpointing=True)
    pair.create(SPECS)
    pair.run(**passes(work(1, [[9, 2, 31, 4], [17], [3, 3, 8]]), tokens=40))
    step_all(pair)
    pair.run(**passes(work(2, [[2]])))
    pair.assert_same_slots([0])
    samples = tuple(make_sample(f"x{i}", [1, 2, i], max_tokens=6, seed=i) for i in range(3))
    pair.run(samples=samples, decode_budget_s=60.0)


@ways
def test_a_rank_without_any_sequence_goes_along(both: BothFactory, sharding: str) -> None:
    pair = both(sharding)
    pair.create(SPECS[:1])
    pair.run(**passes([(0, work(1, [[6]])[0][1], "cross_entropy")]))
    pair.run(**passes(work(2, [[7]]), backward=False))
    pair.assert_same_slots([0])


@ways
def test_what_is_paged_out_comes_back_with_its_parts_of_gradients(both: BothFactory, sharding: str) -> None:
    pair = both(sharding)
    pair.create(SPECS)
    pair.run(**passes(work(1, [[9, 2], [5], [4]])))
    pair.run(page_out=(PageOut(1, "run1"),))
    pair.run(**passes([work(2, [[3, 3]])[0]]))
    pair.run(page_in=(PageIn(1, "run1"),))
    pair.assert_same_slots([0, 1])
    step_all(pair)
    pair.run(**passes(work(2, [[3, 3], [6, 5]])))
    pair.assert_same_slots([0, 1])


@ways
def test_one_request_that_is_not_finite_fails_alone(both: BothFactory, sharding: str) -> None:
    """Its datum lies on one rank; the other one must hear of it, and take back its own part."""
    pair = both(sharding)
    pair.create(SPECS)
    good, bad, other = work(1, [[9, 2], [5, 4], [7]])
    column = bad[1].columns["advantages"]
    values = np.array(column.values)
    values[-1] = np.nan
    columns = {**bad[1].columns, "advantages": Column(values, column.widths)}
    bad = (bad[0], DatumBatch(bad[1].tokens, bad[1].lengths, columns), bad[2])
    found = pair.run(**passes([good, bad, other]))
    assert found["p1"].failure is not None
    pair.assert_same_slots([0, 2])
    assert pair.state(1).grads is None
    pair.run(**passes([good, work(1, [[1], [6]])[1]]))
    pair.assert_same_slots([0, 1])


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_out_of_memory_on_one_rank_is_done_again_in_halves(both: BothFactory, direction: str) -> None:
    pair = both("expert_parallel", activation_checkpointing=direction == "backward")
    pair.create(SPECS)
    pair.crew.run(remote.fail_once, pair.config, 1, 12, torch.OutOfMemoryError("planted"), direction)
    pair.run(**passes(work(1, [[14, 12], [5, 6], [9]])))
    pair.assert_same_slots(range(3))


def test_a_bug_on_one_rank_is_the_failure_of_that_request(both: BothFactory) -> None:
    pair = both("expert_parallel")
    pair.create(SPECS)
    pair.crew.run(remote.fail_once, pair.config, 1, 1, RuntimeError("planted"), "forward")
    tick = passes([work(1, [[14, 12]])[0]])
    found = remote_outcomes(pair, tick)
    assert found["p0"].failure is not None
    assert found["p0"].failure.category == "server"
    assert pair.state(0).grads is None
    pair.run(**tick)
    pair.assert_same_slots([0])


@ways
def test_a_bug_in_a_loss_on_one_rank_is_the_failure_of_that_request(both: BothFactory, sharding: str) -> None:
    pair = both(sharding)
    pair.create(SPECS)
    fields = passes([work(1, [[14, 12]])[0]])
    pair.crew.run(remote.fail_in_loss, 1)
    failure = remote_outcomes(pair, fields)["p0"].failure
    assert failure is not None
    assert failure.category == "server"
    pair.run(**fields)
    pair.assert_same_slots([0])


def remote_outcomes(pair: Both, fields: dict) -> dict:  # type: ignore[type-arg]
    items, _ = pair.crew.run(remote.run_tick, pair.config, remote.Tick(1, **fields))
    return {item.request_id: item for item in items[:-1]}


def test_a_dense_model_that_no_table_knows(both: BothFactory, tiny_llama: Path) -> None:
    """Its unembedding is tied to the embedding."""
    pair = both("zero3", tiny_llama)
    pair.create(SPECS)
    pair.run(**passes(work(1, [[9, 2, 31, 4], [17], [3, 3, 8]])))
    step_all(pair)
    pair.run(**passes(work(2, [[4], [2, 2]])))
    pair.assert_same_slots([0, 1])


def test_grouped_products(both: BothFactory) -> None:
    pair = both("expert_parallel", kernels="grouped")
    pair.create([replace(spec, rank=8) for spec in SPECS])
    pair.run(**passes(work(1, [[9, 2, 31, 4], [17], [3, 3, 8]])))
    pair.assert_same_slots(range(3))


def test_two_ranks_have_half_of_the_experts_each(both: BothFactory) -> None:
    pair = both("expert_parallel")
    whole = pair.one.memory()
    for memory in pair.crew.run(remote.memory, pair.config):
        assert memory["experts"] * 2 == whole["experts"]
        assert memory["base"] - memory["experts"] == whole["base"] - whole["experts"]
        assert memory["kv"] * 2 == whole["kv"]
        for use in ("slots", "gradients", "moments"):
            assert whole[use] / 2 < memory[use] < whole[use]


def test_under_zero3_ranks_have_half_of_the_layers(both: BothFactory) -> None:
    pair = both("zero3")
    whole = pair.one.memory()
    for memory in pair.crew.run(remote.memory, pair.config):
        assert memory["experts"] * 2 == whole["experts"]
        assert memory["base"] < whole["base"]
        assert memory["slots"] == whole["slots"]
