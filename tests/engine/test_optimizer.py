"""Block AdamW against torch's own optimizer and clipping; refusals, isolation and what must stay zero."""

from __future__ import annotations

import math
from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from twinkle_serve.engine.layout import AdapterLayout, Target
from twinkle_serve.engine.optimizer import (
    DueStep,
    NonFiniteGradientError,
    SlotStep,
    adamw_step,
    adamw_steps,
)
from twinkle_serve.engine.slots import SlotPool
from twinkle_serve.protocol.data import AdamParams, LoraSpec


class Blocks(NamedTuple):
    weights: torch.Tensor
    grads: torch.Tensor
    exp_avg: torch.Tensor
    exp_avg_sq: torch.Tensor

    def due(self, steps_taken: int, params: AdamParams) -> DueStep:
        return DueStep(*self, steps_taken, params)

    def copy(self) -> Blocks:
        return Blocks(*(block.clone() for block in self))


def fresh(*shape: int, seed: int = 0) -> Blocks:
    weights = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    return Blocks(weights, *(torch.zeros(*shape) for _ in range(3)))


def gradients(shape: tuple[int, ...], steps: int, scale: float = 1.0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(17)
    return [scale * torch.randn(*shape, generator=generator) for _ in range(steps)]


def torch_adamw(
    weights: torch.Tensor, grads: list[torch.Tensor], schedule: list[AdamParams], *, fused: bool
) -> torch.Tensor:
    """What ``torch.optim.AdamW`` makes of the same gradients."""
    parameter = torch.nn.Parameter(weights.clone())
    optimizer = torch.optim.AdamW([parameter], fused=fused)
    for grad, params in zip(grads, schedule, strict=True):
        parameter.grad = grad.clone()
        if params.grad_clip_norm > 0:
            torch.nn.utils.clip_grad_norm_([parameter], params.grad_clip_norm)
        optimizer.param_groups[0].update(
            lr=params.learning_rate,
            betas=(params.beta1, params.beta2),
            eps=params.eps,
            weight_decay=params.weight_decay,
        )
        optimizer.step()
    return parameter.detach()


def ours(weights: torch.Tensor, grads: list[torch.Tensor], schedule: list[AdamParams]) -> torch.Tensor:
    blocks = Blocks(weights.clone(), *(torch.zeros_like(weights) for _ in range(3)))
    for number, (grad, params) in enumerate(zip(grads, schedule, strict=True)):
        blocks.grads.copy_(grad)
        adamw_steps([blocks.due(number, params)])
    return blocks.weights


CHANGING = [
    AdamParams(),
    AdamParams(learning_rate=1e-2, weight_decay=0.1),
    AdamParams(learning_rate=1e-3, beta1=0.8, beta2=0.999, eps=1e-8),
    AdamParams(learning_rate=5e-3, grad_clip_norm=0.5),
    AdamParams(learning_rate=5e-3, grad_clip_norm=1e6, weight_decay=0.01),
    AdamParams(learning_rate=0.0, weight_decay=0.5),
]


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e4])
def test_it_equals_torch_adamw_while_hyperparameters_change(scale: float) -> None:
    weights, grads = torch.randn(4, 1024), gradients((4, 1024), len(CHANGING), scale)
    mine = ours(weights, grads, CHANGING)
    plain = torch_adamw(weights, grads, CHANGING, fused=False)
    torch.testing.assert_close(mine, plain, rtol=1e-7, atol=1e-7)


def test_without_clipping_it_is_bitwise_torchs_fused_adamw() -> None:
    schedule = [params for params in CHANGING if params.grad_clip_norm == 0]
    weights, grads = torch.randn(3, 4112), gradients((3, 4112), len(schedule))
    assert torch.equal(ours(weights, grads, schedule), torch_adamw(weights, grads, schedule, fused=True))


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 5),
    columns=st.integers(1, 400),
    learning_rate=st.floats(0, 0.1),
    beta1=st.floats(0, 0.99),
    beta2=st.floats(0, 0.999),
    weight_decay=st.floats(0, 0.5),
    clip=st.sampled_from([0.0, 1e-3, 1.0, 1e3]),
)
def test_it_equals_torch_adamw_for_any_shape_and_hyperparameters(
    rows: int,
    columns: int,
    learning_rate: float,
    beta1: float,
    beta2: float,
    weight_decay: float,
    clip: float,
) -> None:
    params = AdamParams(learning_rate, beta1, beta2, 1e-8, weight_decay, clip)
    weights, grads = torch.randn(rows, columns), gradients((rows, columns), 3)
    mine, plain = ours(weights, grads, [params] * 3), torch_adamw(weights, grads, [params] * 3, fused=False)
    # Three steps of up to 0.1 each, rounded in another order by the fused kernel.
    torch.testing.assert_close(mine, plain, rtol=1e-6, atol=2e-6)


def test_many_adapters_at_once_equal_each_alone_bitwise() -> None:
    schedules = [CHANGING[0], CHANGING[1], CHANGING[0], CHANGING[3]]
    adapters = [fresh(rank, 2000, seed=rank) for rank in (1, 3, 2, 4)]
    for blocks in adapters:
        blocks.grads.normal_()
    alone = [blocks.copy() for blocks in adapters]
    taken = [0, 5, 2, 1]
    together = adamw_steps([b.due(n, p) for b, n, p in zip(adapters, taken, schedules, strict=True)])
    for blocks, copy, number, params, outcome in zip(
        adapters, alone, taken, schedules, together, strict=True
    ):
        assert adamw_steps([copy.due(number, params)]) == [outcome]
        assert all(torch.equal(x, y) for x, y in zip(blocks, copy, strict=True))


def test_clipping_is_that_of_clip_grad_norm_where_its_epsilon_counts() -> None:
    """Seen in the first moment, because the step itself hardly depends on the gradient's size."""
    blocks = fresh(1, 4)
    blocks.grads.copy_(torch.tensor([[3e-6, 0.0, 4e-6, 0.0]]))
    parameter = torch.nn.Parameter(blocks.weights.clone())
    parameter.grad = blocks.grads.clone()
    torch.nn.utils.clip_grad_norm_([parameter], 1e-6)
    adamw_steps([blocks.due(0, AdamParams(beta1=0.5, grad_clip_norm=1e-6))])
    torch.testing.assert_close(blocks.exp_avg, 0.5 * parameter.grad, rtol=1e-6, atol=0)


def test_metrics_report_the_norm_before_clipping_and_the_learning_rate() -> None:
    blocks = fresh(1, 4)
    blocks.grads.copy_(torch.tensor([[3.0, 0.0, 4.0, 0.0]]))
    assert adamw_steps([blocks.due(0, AdamParams(learning_rate=0.5, grad_clip_norm=0.1))]) == [
        {"grad_norm": 5.0, "learning_rate": 0.5}
    ]


def test_gradients_are_zero_after_a_step() -> None:
    blocks = fresh(2, 40)
    blocks.grads.normal_()
    adamw_steps([blocks.due(0, AdamParams())])
    assert not blocks.grads.any()


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 1e25])
def test_a_step_on_gradients_that_are_not_finite_is_refused_alone(bad: float) -> None:
    """1e25 is finite but its square is not: the second moment would be infinite for ever after."""
    broken, healthy = fresh(2, 5000, seed=1), fresh(3, 100, seed=2)
    for blocks in (broken, healthy):
        blocks.grads.normal_()
        blocks.exp_avg.normal_()
        blocks.exp_avg_sq.uniform_()
    broken.grads[1, 4997] = bad
    before, expected = broken.copy(), healthy.copy()
    params = AdamParams(grad_clip_norm=1.0)
    refused, taken = adamw_steps([broken.due(3, params), healthy.due(3, params)])
    assert isinstance(refused, NonFiniteGradientError)
    assert "not finite" in str(refused)
    assert torch.equal(broken.weights, before.weights)
    assert torch.equal(broken.exp_avg, before.exp_avg)
    assert torch.equal(broken.exp_avg_sq, before.exp_avg_sq)
    assert not broken.grads.any()
    assert adamw_steps([expected.due(3, params)]) == [taken]
    assert torch.equal(healthy.weights, expected.weights)


@pytest.mark.parametrize("eps", [1e-12, 1e-60])
def test_what_is_zero_and_has_no_gradient_stays_zero(eps: float) -> None:
    """Groups that are not trained, and padding: also under weight decay, also with an eps below float32."""
    blocks = fresh(2, 64)
    blocks.weights[:, 20:44] = 0
    for number in range(3):
        blocks.grads.normal_()
        blocks.grads[:, 20:44] = 0
        adamw_steps([blocks.due(number, AdamParams(learning_rate=0.1, eps=eps, weight_decay=0.3))])
    assert blocks.weights.isfinite().all()
    for block in blocks:
        assert not block[:, 20:44].any()
    assert blocks.weights[:, :20].all()


def test_a_step_without_gradient_decays_weights_and_goes_on_with_the_momentum() -> None:
    params = AdamParams(learning_rate=0.01, weight_decay=0.1)
    weights = torch.randn(2, 50)
    grads = [torch.randn(2, 50), torch.zeros(2, 50)]
    expected = torch_adamw(weights, grads, [params] * 2, fused=False)
    torch.testing.assert_close(ours(weights, grads, [params] * 2), expected, rtol=1e-7, atol=1e-7)


def test_the_norm_of_a_large_block_is_exact_to_float32() -> None:
    """One float32 sum over this many elements would be off in the fourth digit."""
    blocks = fresh(1, 8_000_001)
    blocks.grads.fill_(1e-3)
    (metrics,) = adamw_steps([blocks.due(0, AdamParams())])
    assert isinstance(metrics, dict)
    exact = float(torch.tensor(1e-3)) * math.sqrt(8_000_001)
    assert metrics["grad_norm"] == pytest.approx(exact, rel=3e-6)


def test_slots_are_stepped_counted_and_left_without_gradients() -> None:
    layout = AdapterLayout.build([Target("linear", "m.q_proj", "attn", 20, 30)])
    pool = SlotPool(layout, num_slots=3, max_rank=4, device=torch.device("cpu"))
    for slot, rank in ((0, 2), (2, 4)):
        pool.create(slot, LoraSpec(rank=rank, seed=slot))
        pool.blocks(slot)[1].normal_()
        pool.has_grads[slot] = True
    pool.steps[2] = 7
    pool.blocks(0)[1][0, 0] = math.nan
    solo = Blocks(*(block.clone() for block in pool.blocks(2)))
    expected = adamw_steps([solo.due(7, AdamParams())])
    refused, taken = adamw_step([SlotStep(pool, 0, AdamParams()), SlotStep(pool, 2, AdamParams())])
    assert isinstance(refused, NonFiniteGradientError)
    assert [taken] == expected
    assert all(torch.equal(x, y) for x, y in zip(pool.blocks(2), solo, strict=True))
    assert pool.steps == [0, 0, 8]
    assert pool.has_grads == [False, False, False]
    assert not pool.grads.any()


def test_nothing_due_is_nothing_done() -> None:
    assert adamw_steps([]) == []
