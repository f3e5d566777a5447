"""The chunked head against plain autograd in double precision; its memory, isolation and edge cases."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from twinkle_serve.engine.layout import AdapterLayout, Target
from twinkle_serve.engine.logprobs import HeadSegment, full_logits, target_logprobs, top_k_logprobs
from twinkle_serve.engine.slots import Segment, SlotPool
from twinkle_serve.protocol.data import LoraSpec

HIDDEN, VOCAB = 12, 37


class Case(NamedTuple):
    hidden: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor | None
    segments: list[HeadSegment]


def make_case(spans: list[tuple[int, int]], num_rows: int, seed: int, *, bias: bool = False) -> Case:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    segments = []
    for number, (start, end) in enumerate(spans):
        rank = 1 + (seed + 3 * number) % 5
        a, b_t = normal(rank, HIDDEN), 0.5 * normal(rank, VOCAB)
        segments.append(
            HeadSegment(start, end, a, b_t, 32 / rank / 8, torch.zeros_like(a), torch.zeros_like(b_t))
        )
    return Case(normal(num_rows, HIDDEN), normal(VOCAB, HIDDEN), normal(VOCAB) if bias else None, segments)


class Reference(NamedTuple):
    logprobs: torch.Tensor
    d_hidden: torch.Tensor
    d_factors: list[tuple[torch.Tensor, torch.Tensor]]


def reference(case: Case, rows: torch.Tensor, targets: torch.Tensor, grad: torch.Tensor) -> Reference:
    """The same by materialising every logit in float64 and letting autograd do the rest."""
    hidden = case.hidden.detach().double().requires_grad_()
    logits = hidden @ case.weight.double().t()
    if case.bias is not None:
        logits = logits + case.bias.double()
    factors, deltas, position = [], [], 0
    for segment in case.segments:
        a, b_t = segment.a.double().requires_grad_(), segment.b_t.double().requires_grad_()
        factors.append((a, b_t))
        deltas.append(hidden.new_zeros(segment.start - position, VOCAB))
        deltas.append(segment.scale * (hidden[segment.start : segment.end] @ a.t() @ b_t))
        position = segment.end
    deltas.append(hidden.new_zeros(hidden.shape[0] - position, VOCAB))
    logprobs = torch.log_softmax(logits + torch.cat(deltas), dim=1)[rows, targets]
    logprobs.backward(grad.double())
    assert hidden.grad is not None
    return Reference(
        logprobs.detach(),
        hidden.grad,
        [
            (
                torch.zeros_like(a) if a.grad is None else a.grad,
                torch.zeros_like(b) if b.grad is None else b.grad,
            )
            for a, b in factors
        ],
    )


def close(actual: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(actual.double(), expected.double(), rtol=tolerance, atol=tolerance)


@st.composite
def packed(draw: st.DrawFn) -> tuple[int, list[tuple[int, int]], list[int]]:
    """(number of rows, disjoint ascending spans with gaps, ascending rows with repeats and omissions)."""
    num_rows = draw(st.integers(1, 24))
    edges = sorted(draw(st.lists(st.integers(0, num_rows), max_size=8)))
    spans = [(a, b) for a, b in zip(edges[::2], edges[1::2], strict=False) if b > a]
    rows = sorted(draw(st.lists(st.integers(0, num_rows - 1), min_size=1, max_size=40)))
    return num_rows, spans, rows


@settings(max_examples=150, deadline=None)
@given(
    shape=packed(),
    seed=st.integers(0, 1000),
    chunk_tokens=st.integers(1, 30),
    isolated=st.booleans(),
    cache_bytes=st.sampled_from([0, 2**20]),
    bias=st.booleans(),
)
def test_it_equals_plain_autograd(
    shape: tuple[int, list[tuple[int, int]], list[int]],
    seed: int,
    chunk_tokens: int,
    isolated: bool,
    cache_bytes: int,
    bias: bool,
) -> None:
    num_rows, spans, row_list = shape
    case = make_case(spans, num_rows, seed, bias=bias)
    rows = torch.tensor(row_list)
    targets = torch.randint(0, VOCAB, rows.shape)
    grad = torch.randn(rows.shape) * (torch.rand(rows.shape) < 0.7)
    hidden = case.hidden.clone().requires_grad_()
    logprobs = target_logprobs(
        hidden,
        case.weight,
        case.bias,
        case.segments,
        rows,
        targets,
        chunk_tokens=chunk_tokens,
        isolated=isolated,
        cache_bytes=cache_bytes,
    )
    logprobs.backward(grad)
    expected = reference(case, rows, targets, grad)
    close(logprobs, expected.logprobs)
    assert hidden.grad is not None
    close(hidden.grad, expected.d_hidden)
    for segment, (d_a, d_b_t) in zip(case.segments, expected.d_factors, strict=True):
        assert segment.grad_a is not None
        assert segment.grad_b_t is not None
        close(segment.grad_a, d_a, 3e-5)
        close(segment.grad_b_t, d_b_t, 3e-5)


def run(
    case: Case, rows: torch.Tensor, targets: torch.Tensor, grad: torch.Tensor, **options: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    hidden = case.hidden.clone().requires_grad_()
    logprobs = target_logprobs(hidden, case.weight, case.bias, case.segments, rows, targets, **options)
    logprobs.backward(grad)
    assert hidden.grad is not None
    return logprobs.detach(), hidden.grad


@pytest.mark.parametrize("cache_bytes", [0, 2**30])
def test_a_segments_numbers_are_bitwise_those_it_has_alone(cache_bytes: int) -> None:
    spans = [(0, 5), (5, 18), (18, 19), (19, 64)]
    together = make_case(spans, 64, seed=1)
    rows, targets, grad = torch.arange(64), torch.randint(0, VOCAB, (64,)), torch.randn(64)
    options = {"chunk_tokens": 16, "cache_bytes": cache_bytes}
    logprobs, d_hidden = run(together, rows, targets, grad, **options)
    for number, (start, end) in enumerate(spans):
        shared = together.segments[number]
        assert shared.grad_a is not None
        assert shared.grad_b_t is not None
        own = shared._replace(
            start=0, end=end - start, grad_a=torch.zeros_like(shared.a), grad_b_t=torch.zeros_like(shared.b_t)
        )
        alone = Case(together.hidden[start:end], together.weight, None, [own])
        own_logprobs, own_d_hidden = run(
            alone, torch.arange(end - start), targets[start:end], grad[start:end], **options
        )
        assert torch.equal(own_logprobs, logprobs[start:end])
        assert torch.equal(own_d_hidden, d_hidden[start:end])
        assert torch.equal(own.grad_a, shared.grad_a)
        assert torch.equal(own.grad_b_t, shared.grad_b_t)


def test_gradients_land_in_the_slot_and_nowhere_else() -> None:
    target = Target("linear", "lm_head", "unembed", HIDDEN, VOCAB)
    layout = AdapterLayout.build([Target("linear", "other", "attn", 3, 5), target])
    pool = SlotPool(layout, num_slots=4, max_rank=6, device=torch.device("cpu"))
    pool.create(2, LoraSpec(rank=3, seed=7))
    layout.b_t(pool.weights[2, :3], layout.targets[1]).normal_()
    segments = HeadSegment.of([Segment(pool.adapter(2), 0, 9)], 1)
    case = make_case([], 9, seed=3)._replace(segments=segments)
    rows, targets, grad = torch.arange(9), torch.randint(0, VOCAB, (9,)), torch.randn(9)
    run(case, rows, targets, grad, chunk_tokens=4)
    expected = reference(case, rows, targets, grad)
    close(layout.a(pool.grads[2, :3], layout.targets[1]), expected.d_factors[0][0])
    close(layout.b_t(pool.grads[2, :3], layout.targets[1]), expected.d_factors[0][1])
    pool.grads[2, :3, layout.targets[1].a_offset :] = 0
    assert not pool.grads.any()


def test_gradients_accumulate_and_a_second_backward_equals_the_first() -> None:
    case = make_case([(0, 6)], 6, seed=5)
    hidden = case.hidden.clone().requires_grad_()
    logprobs = target_logprobs(
        hidden, case.weight, None, case.segments, torch.arange(6), torch.zeros(6, dtype=torch.int64)
    )
    logprobs.sum().backward(retain_graph=True)
    grad_a = case.segments[0].grad_a
    assert grad_a is not None
    assert hidden.grad is not None
    once, once_hidden = grad_a.clone(), hidden.grad.clone()
    logprobs.sum().backward()
    close(grad_a, 2 * once)
    close(hidden.grad, 2 * once_hidden)


@pytest.mark.parametrize("cache_bytes", [0, 2**30])
def test_rows_without_gradient_are_not_touched_by_backward(cache_bytes: int) -> None:
    """A broken row that no loss looks at must not spoil its neighbours: 0 * NaN is NaN."""
    case = make_case([(0, 8)], 8, seed=2)
    case.hidden[3] = float("nan")
    grad = torch.tensor([1.0, 0, 2, 0, 0, 1, 1, 0])
    logprobs, d_hidden = run(
        case,
        torch.arange(8),
        torch.zeros(8, dtype=torch.int64),
        grad,
        chunk_tokens=4,
        cache_bytes=cache_bytes,
    )
    assert logprobs.isnan().tolist() == [False, False, False, True, False, False, False, False]
    segment = case.segments[0]
    assert segment.grad_a is not None
    assert segment.grad_b_t is not None
    assert d_hidden.isfinite().all()
    assert segment.grad_a.isfinite().all()
    assert segment.grad_b_t.isfinite().all()
    assert (d_hidden[grad == 0] == 0).all()


def test_a_gradient_of_zeros_changes_nothing() -> None:
    case = make_case([(0, 4)], 4, seed=2)
    _, d_hidden = run(case, torch.arange(4), torch.zeros(4, dtype=torch.int64), torch.zeros(4))
    assert not d_hidden.any()
    assert case.segments[0].grad_a is not None
    assert not case.segments[0].grad_a.any()


class _Largest(TorchDispatchMode):
    """Remembers the largest tensor that any operation returned, in elements."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for value in out if isinstance(out, tuple | list) else (out,):
            if isinstance(value, torch.Tensor):
                self.numel = max(self.numel, value.numel())
        return out


def test_no_more_than_a_chunk_of_logits_is_ever_alive() -> None:
    case = make_case([(0, 100), (100, 200)], 200, seed=4)
    hidden = case.hidden.clone().requires_grad_()
    rows, targets = torch.arange(200), torch.randint(0, VOCAB, (200,))
    with _Largest() as largest:
        logprobs = target_logprobs(
            hidden, case.weight, None, case.segments, rows, targets, chunk_tokens=20, cache_bytes=0
        )
        logprobs.sum().backward()
    assert largest.numel <= max(20 * VOCAB, hidden.numel())


def test_logits_are_kept_only_when_they_fit_and_a_gradient_can_come() -> None:
    case = make_case([], 20, seed=4)
    rows, targets = torch.arange(20), torch.zeros(20, dtype=torch.int64)
    size = 20 * VOCAB * 4
    for cache_bytes, wants_grad, kept in ((size, True, True), (size - 1, True, False), (size, False, False)):
        hidden = case.hidden.clone().requires_grad_(wants_grad)
        with _Largest() as largest:
            target_logprobs(
                hidden, case.weight, None, [], rows, targets, chunk_tokens=2, cache_bytes=cache_bytes
            )
        assert (largest.numel >= 20 * VOCAB) == kept


def test_forward_without_gradients_keeps_no_graph() -> None:
    case = make_case([(0, 4)], 4, seed=2)
    with torch.no_grad():
        hidden = case.hidden.clone().requires_grad_()
        logprobs = target_logprobs(
            hidden, case.weight, None, case.segments, torch.arange(4), torch.zeros(4, dtype=torch.int64)
        )
    assert not logprobs.requires_grad


def test_a_frozen_adapter_passes_gradients_on() -> None:
    case = make_case([(0, 4)], 4, seed=9)
    frozen = case._replace(segments=[case.segments[0]._replace(grad_a=None, grad_b_t=None)])
    rows, targets, grad = torch.arange(4), torch.tensor([1, 2, 3, 4]), torch.randn(4)
    _, d_hidden = run(frozen, rows, targets, grad)
    close(d_hidden, reference(case, rows, targets, grad).d_hidden)


def test_likely_and_hopeless_tokens_keep_their_digits() -> None:
    """Logits around 80, where float32 itself has steps of 8e-6, still give logprobs good to 2e-7."""
    weight = torch.zeros(VOCAB, HIDDEN)
    weight[0, 0], weight[1, 0] = 80.0, 66.0
    hidden = torch.zeros(1, HIDDEN)
    hidden[0, 0] = 1.0
    rows, targets = torch.zeros(3, dtype=torch.int64), torch.tensor([0, 1, 2])
    logprobs = target_logprobs(hidden, weight, None, [], rows, targets)
    exact = torch.log_softmax((hidden.double() @ weight.double().t()), dim=1)[0, :3]
    torch.testing.assert_close(logprobs.double(), exact, rtol=1e-7, atol=2e-7)


def test_no_logprob_is_above_zero() -> None:
    case = make_case([], 200, seed=11)
    for scale in (0.01, 1.0, 100.0):
        rows = torch.arange(200)
        best = (scale * case.hidden @ case.weight.t()).argmax(dim=1)
        assert (target_logprobs(scale * case.hidden, case.weight, None, [], rows, best) <= 0).all()


def test_log_softmax_is_float32_under_bfloat16() -> None:
    case = make_case([(0, 8)], 8, seed=6)
    half = case._replace(hidden=case.hidden.bfloat16(), weight=case.weight.bfloat16())
    rows, targets, grad = torch.arange(8), torch.randint(0, VOCAB, (8,)), torch.randn(8)
    logprobs, d_hidden = run(half, rows, targets, grad)
    rounded = half._replace(hidden=half.hidden.float(), weight=half.weight.float())
    expected = reference(rounded, rows, targets, grad)
    assert logprobs.dtype == torch.float32
    assert d_hidden.dtype == torch.bfloat16
    close(logprobs, expected.logprobs, 5e-2)
    close(d_hidden.float(), expected.d_hidden, 5e-2)
    segment = half.segments[0]
    assert segment.grad_b_t is not None
    assert segment.grad_b_t.dtype == torch.float32
    close(segment.grad_b_t, expected.d_factors[0][1], 5e-2)


def test_no_elements_is_an_empty_answer() -> None:
    case = make_case([], 3, seed=1)
    none = torch.zeros(0, dtype=torch.int64)
    assert target_logprobs(case.hidden, case.weight, None, [], none, none).shape == (0,)


def test_full_logits_are_base_plus_low_rank_row_by_row() -> None:
    case = make_case([(1, 2), (2, 5)], 6, seed=8, bias=True)
    expected = case.hidden @ case.weight.t() + case.bias
    for segment in case.segments:
        part = slice(segment.start, segment.end)
        expected[part] += segment.scale * (case.hidden[part] @ segment.a.t() @ segment.b_t)
    close(full_logits(case.hidden, case.weight, case.bias, case.segments), expected)


@pytest.mark.parametrize("k", [1, 5, VOCAB, VOCAB + 3])
def test_the_best_tokens_and_their_logprobs(k: int) -> None:
    case = make_case([(0, 3), (4, 9)], 10, seed=8, bias=True)
    token_ids, logprobs = top_k_logprobs(
        case.hidden, case.weight, case.bias, case.segments, k, chunk_tokens=3
    )
    full = torch.log_softmax(full_logits(case.hidden, case.weight, case.bias, case.segments), dim=1)
    best = full.topk(min(k, VOCAB), dim=1)
    assert torch.equal(token_ids, best.indices)
    close(logprobs, best.values)
