"""Every loss against its formula, written out position by position in plain Python, by value and gradient."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from twinkle_serve.engine.losses import compute_loss
from twinkle_serve.protocol.errors import UserError
from twinkle_serve.protocol.losses import LOSSES


def _clamp(x: float, low: float, high: float) -> float:
    return min(max(x, low), high)


def _surrogate(ratio: float, advantage: float, low: float, high: float) -> tuple[float, float]:
    """-min(r A, clip(r) A) and its derivative by log r."""
    clipped = _clamp(ratio, low, high)
    if ratio * advantage <= clipped * advantage:
        return -ratio * advantage, -ratio * advantage
    return -clipped * advantage, 0.0


def _expected(
    name: str, lp: list[float], x: dict[str, list[float]], lengths: list[int], config: dict[str, float]
) -> Any:
    """(loss, gradient by logprob), from the published formulas in double precision."""
    loss, grad = 0.0, []
    low = x.get(
        "clip_low_threshold", [config.get("clip_low_threshold", 0.0 if name == "cispo" else 0.8)] * len(lp)
    )
    high = x.get(
        "clip_high_threshold", [config.get("clip_high_threshold", 4.0 if name == "cispo" else 1.2)] * len(lp)
    )
    start = 0
    for length in lengths:
        rows = range(start, start + length)
        mask = x.get("sequence_ratio_mask", [1.0] * len(lp))
        counted = sum(mask[t] for t in rows)
        if name == "gspo":
            mean = sum(mask[t] * (lp[t] - x["logprobs"][t]) for t in rows) / counted if counted else 0.0
        for t in rows:
            if name == "cross_entropy":
                w = x["weights"][t] if "weights" in x else 1.0
                value, slope = -lp[t] * w, -w
            else:
                a, q = x["advantages"][t], x["logprobs"][t]
                r = math.exp(lp[t] - q)
                if name == "importance_sampling":
                    value, slope = -r * a, -r * a
                elif name == "ppo":
                    value, slope = _surrogate(r, a, low[t], high[t])
                elif name == "cispo":
                    c = _clamp(r, low[t], high[t])
                    value, slope = -c * lp[t] * a, -c * a
                elif name == "dro":
                    beta = config.get("beta", 0.05)
                    value, slope = -(lp[t] * a - 0.5 * beta * (lp[t] - q) ** 2), -(a - beta * (lp[t] - q))
                else:
                    value, slope = _surrogate(math.exp(mean), a, low[t], high[t])
            loss += value
            grad.append(slope)
        start += length
    return loss, grad


def _batch(lengths: list[int], seed: int, *names: str) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)

    def normal() -> torch.Tensor:
        return torch.randn(sum(lengths), generator=generator)

    logprobs = -normal().exp()
    columns = {
        "weights": normal(),
        "logprobs": logprobs + 0.5 * normal(),
        "advantages": normal() * (normal() > -0.5),
        "clip_low_threshold": 0.5 + 0.4 * torch.rand(sum(lengths), generator=generator),
        "clip_high_threshold": 1.1 + 0.4 * torch.rand(sum(lengths), generator=generator),
        "sequence_ratio_mask": (normal() > 0).float(),
    }
    return logprobs, {name: columns[name] for name in names}


CASES: list[tuple[str, tuple[str, ...], dict[str, float]]] = [
    ("cross_entropy", (), {}),
    ("cross_entropy", ("weights",), {}),
    ("importance_sampling", ("logprobs", "advantages"), {}),
    ("ppo", ("logprobs", "advantages"), {}),
    ("ppo", ("logprobs", "advantages"), {"clip_low_threshold": 0.9, "clip_high_threshold": 1.05}),
    ("ppo", ("logprobs", "advantages", "clip_low_threshold", "clip_high_threshold"), {}),
    ("ppo", ("logprobs", "advantages", "clip_high_threshold"), {"clip_low_threshold": 0.95}),
    ("cispo", ("logprobs", "advantages"), {}),
    ("cispo", ("logprobs", "advantages"), {"clip_low_threshold": 0.8, "clip_high_threshold": 1.2}),
    ("dro", ("logprobs", "advantages"), {}),
    ("dro", ("logprobs", "advantages"), {"beta": 0.7}),
    ("gspo", ("logprobs", "advantages"), {}),
    ("gspo", ("logprobs", "advantages", "sequence_ratio_mask"), {}),
    ("gspo", ("logprobs", "advantages", "sequence_ratio_mask"), {"clip_high_threshold": 3.0}),
]


@pytest.mark.parametrize(("name", "columns", "config"), CASES)
@settings(max_examples=25, deadline=None)
@given(lengths=st.lists(st.integers(1, 9), min_size=1, max_size=5), seed=st.integers(0, 2**20))
def test_value_and_gradient_follow_the_formula(
    name: str, columns: tuple[str, ...], config: dict[str, float], lengths: list[int], seed: int
) -> None:
    logprobs, inputs = _batch(lengths, seed, *columns)
    logprobs.requires_grad_()
    loss = compute_loss(name, logprobs, inputs, torch.tensor(lengths), config)
    loss.value.backward()
    plain = {key: tensor.double().tolist() for key, tensor in inputs.items()}
    value, grad = _expected(name, logprobs.detach().double().tolist(), plain, lengths, config)
    torch.testing.assert_close(loss.metrics["loss:sum"].item(), value, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(logprobs.grad, torch.tensor(grad), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("name", "columns", "config"), CASES)
def test_losses_metrics_and_gradients_of_chunks_add_up(
    name: str, columns: tuple[str, ...], config: dict[str, float]
) -> None:
    lengths = [4, 1, 7, 3]
    logprobs, inputs = _batch(lengths, 3, *columns)
    logprobs.requires_grad_()
    whole = compute_loss(name, logprobs, inputs, torch.tensor(lengths), config)
    (grad,) = torch.autograd.grad(whole.value, logprobs)
    summed: dict[str, float] = dict.fromkeys(whole.metrics, 0.0)
    for rows, part in ((slice(0, 5), lengths[:2]), (slice(5, 15), lengths[2:])):
        piece = {key: tensor[rows] for key, tensor in inputs.items()}
        loss = compute_loss(name, logprobs[rows], piece, torch.tensor(part), config)
        assert set(loss.metrics) == set(summed)
        (part_grad,) = torch.autograd.grad(loss.value, logprobs)
        assert torch.equal(part_grad[rows], grad[rows]), "a datum's gradient depends on its neighbours"
        for key, metric in loss.metrics.items():
            summed[key] += metric.item()
    for key, metric in whole.metrics.items():
        assert metric.item() == pytest.approx(summed[key], rel=1e-12, abs=1e-12)


def test_every_metric_is_a_sum_with_one_colon() -> None:
    for name in LOSSES:
        logprobs, inputs = _batch([3], 0, "weights", "logprobs", "advantages")
        metrics = compute_loss(name, logprobs, inputs, torch.tensor([3]), {}).metrics
        assert "loss:sum" in metrics
        assert all(key.count(":") == 1 and key.endswith(":sum") for key in metrics)
        assert all(metric.shape == () and not metric.requires_grad for metric in metrics.values())


def test_every_served_loss_is_computed_and_nothing_else() -> None:
    with pytest.raises(UserError, match="cross_entropy, importance_sampling, ppo, cispo, dro, gspo"):
        compute_loss("dpo", torch.zeros(1), {}, torch.tensor([1]), {})
    for name in sorted(set(LOSSES) - {"cross_entropy"}):
        with pytest.raises(UserError, match="'advantages' is missing"):
            compute_loss(name, torch.zeros(1), {}, torch.tensor([1]), {})


def test_metrics_of_a_policy_loss_count_by_hand() -> None:
    logprobs = torch.tensor([-1.0, -1.0, -1.0, -2.0])
    inputs = {
        "logprobs": torch.tensor([-1.5, -1.1, 0.0, -2.0]),  # ratios e^.5, e^.1, (prompt), 1
        "advantages": torch.tensor([1.0, 1.0, 0.0, -1.0]),
    }
    metrics = compute_loss("ppo", logprobs, inputs, torch.tensor([4]), {}).metrics
    assert metrics["scored_tokens:sum"].item() == 3
    assert metrics["clipped_tokens:sum"].item() == 1
    assert metrics["kl_sampled_trained:sum"].item() == pytest.approx(-0.6)


@pytest.mark.parametrize("name", ["importance_sampling", "ppo", "cispo", "gspo"])
def test_a_position_without_advantage_adds_exactly_nothing(name: str) -> None:
    """Prompt positions carry any sampled logprob; a ratio that overflows there must not become NaN."""
    logprobs = torch.tensor([-1.0, -2.0], requires_grad=True)
    inputs = {
        "logprobs": torch.tensor([-500.0, -2.0]),
        "advantages": torch.tensor([0.0, 1.0]),
        "sequence_ratio_mask": torch.tensor([0.0, 1.0]),
    }
    loss = compute_loss(name, logprobs, inputs, torch.tensor([2]), {})
    loss.value.backward()
    assert loss.value.item() == pytest.approx(2.0 if name == "cispo" else -1.0)
    assert logprobs.grad is not None
    assert logprobs.grad.tolist() == pytest.approx([0.0, -1.0])
    assert all(math.isfinite(metric.item()) for metric in loss.metrics.values())


PROMPT, ANSWER = slice(0, 20), slice(20, 30)


def _gradient_of_an_answer(
    name: str, advantage: float, *, prompt_logprobs: float, masked: bool = False
) -> tuple[torch.Tensor, Any]:
    """By logprob, of 20 prompt tokens at -4 and 10 of an answer that is exactly on-policy."""
    logprobs = torch.tensor([-4.0] * 20 + [-1.5] * 10, requires_grad=True)
    inputs = {
        "logprobs": torch.tensor([prompt_logprobs] * 20 + [-1.5] * 10),
        "advantages": torch.tensor([0.0] * 20 + [advantage] * 10),
    }
    if masked:
        inputs["sequence_ratio_mask"] = torch.tensor([0.0] * 20 + [1.0] * 10)
    loss = compute_loss(name, logprobs, inputs, torch.tensor([30]), {})
    loss.value.backward()
    assert logprobs.grad is not None
    return logprobs.grad, loss.metrics


@pytest.mark.parametrize(("advantage", "unmasked", "clipped"), [(1.0, -math.exp(-8 / 3), 0), (-1.0, 0.0, 10)])
def test_without_its_mask_gspo_takes_the_prompt_into_the_ratio(
    advantage: float, unmasked: float, clipped: int
) -> None:
    """As docs/losses.md warns: the zeros that other losses pass over decide here over the whole answer."""
    grad, metrics = _gradient_of_an_answer("gspo", advantage, prompt_logprobs=0.0)
    assert grad[ANSWER].tolist() == pytest.approx([unmasked] * 10)
    assert metrics["clipped_tokens:sum"].item() == clipped
    grad, metrics = _gradient_of_an_answer("gspo", advantage, prompt_logprobs=0.0, masked=True)
    assert grad.tolist() == pytest.approx([0.0] * 20 + [-advantage] * 10)
    assert metrics["clipped_tokens:sum"].item() == 0


def test_the_penalty_of_dro_counts_on_the_prompt_too() -> None:
    """As docs/losses.md warns: a 0 there is a target, the model's own logprob is none."""
    grad, _ = _gradient_of_an_answer("dro", 1.0, prompt_logprobs=0.0)
    assert grad[PROMPT].tolist() == pytest.approx([-0.2] * 20)
    assert grad[ANSWER].tolist() == pytest.approx([-1.0] * 10)
    grad, _ = _gradient_of_an_answer("dro", 1.0, prompt_logprobs=-4.0)
    assert grad.tolist() == pytest.approx([0.0] * 20 + [-1.0] * 10)


def test_negative_and_large_weights_are_used_as_they_are() -> None:
    logprobs = torch.tensor([-0.5, -0.25], requires_grad=True)
    loss = compute_loss(
        "cross_entropy", logprobs, {"weights": torch.tensor([-3.0, 1e6])}, torch.tensor([2]), {}
    )
    loss.value.backward()
    assert loss.metrics["loss:sum"].item() == pytest.approx(-1.5 + 0.25e6)
    assert logprobs.grad is not None
    assert logprobs.grad.tolist() == [3.0, -1e6]


def test_many_targets_per_position_are_just_more_elements() -> None:
    """[N, K] targets arrive flattened; the sum runs over both."""
    logprobs = torch.randn(3, 4)
    weights = torch.randn(3, 4)
    loss = compute_loss(
        "cross_entropy", logprobs.flatten(), {"weights": weights.flatten()}, torch.tensor([12]), {}
    )
    assert loss.metrics["loss:sum"].item() == pytest.approx(-(logprobs * weights).sum().item(), rel=1e-5)


def test_a_sequence_of_gspo_that_counts_nowhere_has_ratio_one() -> None:
    logprobs = torch.tensor([-1.0, -3.0])
    inputs = {
        "logprobs": torch.tensor([-2.0, -1.0]),
        "advantages": torch.ones(2),
        "sequence_ratio_mask": torch.zeros(2),
    }
    assert compute_loss("gspo", logprobs, inputs, torch.tensor([2]), {}).value.item() == -2.0


def test_a_long_sum_keeps_its_precision() -> None:
    logprobs = torch.full((200_000,), -0.1)
    loss = compute_loss("cross_entropy", logprobs, {}, torch.tensor([200_000]), {})
    assert loss.value.item() == pytest.approx(200_000 * float(torch.tensor(0.1)), rel=1e-12)
