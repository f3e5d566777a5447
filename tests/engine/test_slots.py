"""Slots: fresh adapters, saved states, scrubbing."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from twinkle_serve.engine.layout import AdapterLayout, Target
from twinkle_serve.engine.slots import (
    LORA_ALPHA,
    Adapter,
    AdapterState,
    SlotPool,
    initialize,
    trained_groups,
)
from twinkle_serve.protocol.data import LoraSpec

LAYOUT = AdapterLayout.build(
    [
        Target("linear", "q_proj", "attn", 6, 10),
        Target("expert_gate", "experts", "mlp", 6, 4, 3),
        Target("expert_down", "experts", "mlp", 4, 6, 3),
        Target("linear", "lm_head", "unembed", 6, 50),
    ]
)
CPU = torch.device("cpu")
MAX_RANK = 8


def pool(num_slots: int = 3) -> SlotPool:
    return SlotPool(LAYOUT, num_slots, MAX_RANK, CPU)


def everything(slots: SlotPool) -> list[torch.Tensor]:
    return [slots.weights, slots.grads, slots.exp_avg, slots.exp_avg_sq]


def fill(slots: SlotPool, slot: int, seed: int) -> None:
    """As training leaves a slot."""
    generator = torch.Generator().manual_seed(seed)
    for block in slots.blocks(slot):
        block.copy_(torch.rand(block.shape, generator=generator))
    slots.steps[slot], slots.has_grads[slot] = 1 + seed % 5, True


def assert_free(slots: SlotPool, slot: int) -> None:
    assert not slots.is_occupied(slot)
    assert not any(tensor[slot].any() for tensor in everything(slots))
    assert slots.steps[slot] == 0
    assert not slots.has_grads[slot]


def assert_same(one: AdapterState, other: AdapterState) -> None:
    assert (one.spec, one.step) == (other.spec, other.step)
    for name in ("weights", "grads", "exp_avg", "exp_avg_sq"):
        a, b = getattr(one, name), getattr(other, name)
        assert (a is None) == (b is None)
        assert a is None or torch.equal(a, b)


def test_fresh_adapter_has_random_a_and_zero_b() -> None:
    slots = pool()
    slots.create(1, LoraSpec(rank=5, seed=3))
    weights = slots.blocks(1)[0]
    for target in LAYOUT.targets:
        a = LAYOUT.a(weights, target)
        bound = 1 / math.sqrt(target.in_features)
        assert float(a.abs().max()) <= bound
        assert float(a.std()) == pytest.approx(bound / math.sqrt(3), rel=0.3)
        assert a.unique().numel() == a.numel()
        assert not LAYOUT.b_t(weights, target).any()
    assert not slots.weights[1, 5:].any()
    assert not slots.weights[[0, 2]].any()
    assert not any(tensor.any() for tensor in everything(slots)[1:])
    assert slots.adapter(1).scale == LORA_ALPHA / 5


def test_the_seed_decides_and_the_slot_does_not() -> None:
    slots = pool()
    for slot, seed in enumerate((7, 7, 8)):
        slots.create(slot, LoraSpec(rank=4, seed=seed))
    assert torch.equal(slots.weights[0], slots.weights[1])
    assert not torch.equal(slots.weights[0], slots.weights[2])


@pytest.mark.parametrize("seed", [-1, 2**63, 2**64 - 1])
def test_any_integer_is_a_seed(seed: int) -> None:
    initialize(LAYOUT, LoraSpec(rank=2, seed=seed), torch.zeros(2, LAYOUT.row_size))


@pytest.mark.parametrize("left_out", ["attn", "mlp", "unembed"])
def test_groups_that_are_not_trained_are_zero_and_change_no_other(left_out: str) -> None:
    slots = pool()
    slots.create(0, LoraSpec(rank=3, seed=1))
    spec = LoraSpec(rank=3, seed=1, **{f"train_{left_out}": False})
    slots.create(1, spec)
    assert trained_groups(spec) == {"attn", "mlp", "unembed"} - {left_out}
    for target in LAYOUT.targets:
        a = LAYOUT.a(slots.weights[1], target)
        if target.group == left_out:
            assert not a.any()
        else:
            assert torch.equal(a, LAYOUT.a(slots.weights[0], target))


def test_factors_are_views_of_weights_and_gradients() -> None:
    slots = pool()
    slots.create(2, LoraSpec(rank=3))
    factors = slots.adapter(2).factors(1)
    assert slots.adapter(2).factors(1) is factors
    target = LAYOUT.targets[1]
    assert factors.a.shape == (3, 6)
    assert factors.b_t.shape == (3, 12)
    factors.b_t.fill_(2.0)
    assert bool((LAYOUT.b_t(slots.weights[2, :3], target) == 2).all())
    assert factors.grad_a is not None
    factors.grad_a.fill_(3.0)
    assert bool((LAYOUT.a(slots.grads[2, :3], target) == 3).all())
    frozen = Adapter(LAYOUT, LoraSpec(rank=3), slots.weights[2, :3]).factors(1)
    assert frozen.grad_a is None
    assert frozen.grad_b_t is None


def test_a_state_is_a_copy_and_put_brings_it_back() -> None:
    slots = pool()
    slots.create(0, LoraSpec(rank=3, seed=1))
    fill(slots, 0, 2)
    state = slots.state(0)
    expected = [block.clone() for block in slots.blocks(0)]
    fill(slots, 0, 3)
    slots.put(2, state)
    assert all(torch.equal(a, b) for a, b in zip(slots.blocks(2), expected, strict=True))
    assert (slots.steps[2], slots.has_grads[2]) == (3, True)
    assert slots.adapter(2).spec == LoraSpec(rank=3, seed=1)
    assert state.num_bytes() == 4 * 4 * 3 * LAYOUT.row_size
    fill(slots, 2, 4)
    assert torch.equal(state.weights, expected[0])


def test_a_state_holds_only_what_there_is_and_what_is_asked_for() -> None:
    slots = pool()
    slots.create(0, LoraSpec(rank=3))
    fresh = slots.state(0)
    assert (fresh.grads, fresh.exp_avg, fresh.exp_avg_sq, fresh.step) == (None, None, None, 0)
    fill(slots, 0, 2)
    sampling = slots.state(0, grads=False, optimizer=False)
    assert (sampling.grads, sampling.exp_avg, sampling.exp_avg_sq, sampling.step) == (None, None, None, 0)
    slots.put(1, fresh)
    assert not slots.has_grads[1]


def test_clear_grads() -> None:
    slots = pool()
    slots.create(0, LoraSpec(rank=3))
    fill(slots, 0, 2)
    slots.clear_grads(0)
    assert not slots.grads.any()
    assert not slots.has_grads[0]
    assert slots.exp_avg.any()


def test_a_taken_slot_cannot_be_taken_and_a_free_one_has_no_adapter() -> None:
    slots = pool()
    slots.create(0, LoraSpec(rank=3))
    with pytest.raises(AssertionError, match="taken"):
        slots.create(0, LoraSpec(rank=3))
    with pytest.raises(AssertionError, match="free"):
        slots.adapter(1)
    slots.free(1)  # nothing to do
    assert_free(slots, 1)


ACTIONS = st.lists(
    st.tuples(
        st.integers(0, 2),
        st.sampled_from(["create", "fill", "free", "page"]),
        st.integers(1, MAX_RANK),
        st.integers(0, 9),
    ),
    max_size=25,
)


@given(ACTIONS)
def test_a_new_run_is_pristine_after_any_churn(actions: list[tuple[int, str, int, int]]) -> None:
    slots = pool()
    for slot, action, rank, seed in actions:
        if not slots.is_occupied(slot):
            slots.create(slot, LoraSpec(rank=rank, seed=seed))
        elif action == "fill":
            fill(slots, slot, seed)
        elif action == "free":
            slots.free(slot)
        elif action == "page":
            state = slots.state(slot)
            slots.free(slot)
            slots.put(slot, state)
            assert_same(slots.state(slot), state)
    for slot in range(3):
        slots.free(slot)
        assert_free(slots, slot)
        slots.create(slot, LoraSpec(rank=2, seed=slot))
        fresh = torch.zeros(2, LAYOUT.row_size)
        initialize(LAYOUT, LoraSpec(rank=2, seed=slot), fresh)
        assert torch.equal(slots.weights[slot, :2], fresh)
        assert not slots.weights[slot, 2:].any()
        assert not any(tensor[slot].any() for tensor in everything(slots)[1:])
