"""Packed causal attention against softmax written out, one query at a time."""

from __future__ import annotations

import math

import pytest
import torch

from twinkle_serve.engine.attention import AttentionSwitch, PackedCausal, attention_forward, window_mask

HEADS, KV_HEADS, DIM = 4, 2, 8


def naive(
    lengths: list[int],
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scale: float,
    window: int | None,
) -> torch.Tensor:
    """[1, T, Hq, D] by definition."""
    out = torch.zeros(1, query.shape[2], HEADS, DIM)
    out_rows = list(out[0].unbind())
    first = 0
    for length in lengths:
        for row in range(first, first + length):
            low = first if window is None else max(first, row - window + 1)
            heads = []
            for head in range(HEADS):
                kv = head * KV_HEADS // HEADS
                scores = (key[0, kv, low : row + 1] @ query[0, head, row]) * scale
                heads.append(torch.softmax(scores, 0) @ value[0, kv, low : row + 1])
            out_rows[row] = torch.stack(heads)
        first += length
    return torch.stack(out_rows)[None]


def tensors(rows: int, seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = [(1, HEADS, rows, DIM), (1, KV_HEADS, rows, DIM), (1, KV_HEADS, rows, DIM)]
    return [torch.randn(shape, generator=generator, requires_grad=True) for shape in shapes]


@pytest.mark.parametrize("lengths", [[5], [1, 1, 1], [3, 3, 7, 2, 2, 1]])
@pytest.mark.parametrize("window", [None, 1, 3, 100])
def test_packed_causal_is_softmax_within_each_sequence(lengths: list[int], window: int | None) -> None:
    q, k, v = tensors(sum(lengths))
    out = PackedCausal(lengths)(0, q, k, v, 0.4, window)
    expected = naive(lengths, q, k, v, 0.4, window)
    torch.testing.assert_close(out, expected)
    weight = torch.randn(out.shape)
    found = torch.autograd.grad((out * weight).sum(), (q, k, v))
    wanted = torch.autograd.grad((expected * weight).sum(), (q, k, v))
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_no_scale_means_one_over_root_of_the_head_size() -> None:
    q, k, v = tensors(4)
    torch.testing.assert_close(
        PackedCausal([4])(0, q, k, v, None, None), naive([4], q, k, v, 1 / math.sqrt(DIM), None)
    )


def test_a_sequence_does_not_see_its_neighbours_bitwise() -> None:
    q, k, v = (t.detach() for t in tensors(12))
    attend = PackedCausal([4, 5, 3])
    before = attend(0, q, k, v, None, None)
    for tensor in (q, k, v):
        tensor[:, :, :4] = float("nan")
        tensor[:, :, 9:] = float("nan")
    assert torch.equal(attend(0, q, k, v, None, None)[:, 4:9], before[:, 4:9])


@pytest.mark.parametrize("window", [None, 1, 2, 9])
def test_window_mask(window: int | None) -> None:
    mask = window_mask(3, 7, window, torch.device("cpu"))
    for row in range(3):
        position = 4 + row
        for column in range(7):
            near = window is None or position - column < window
            assert bool(mask[row, column]) == (column <= position and near)


def test_modules_call_the_attention_in_force() -> None:
    module = torch.nn.Module()
    switch = AttentionSwitch()
    module.twinkle_attention, module.layer_idx = switch, 3  # type: ignore[assignment]
    q, k, v = tensors(4)
    with pytest.raises(AssertionError, match="outside a pass"):
        attention_forward(module, q, k, v, None)
    seen: list[tuple[int, float | None, int | None]] = []

    def attend(
        layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float | None, window: int | None
    ) -> torch.Tensor:
        seen.append((layer, scale, window))
        return q

    switch.attend = attend
    out, weights = attention_forward(module, q, k, v, None, scaling=0.5, sliding_window=7, dropout=0.0)
    assert seen == [(3, 0.5, 7)]
    assert out is q
    assert weights is None
