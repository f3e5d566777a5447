"""Drawn tokens against the distributions they should follow, alone and in company; stop rules."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from twinkle_serve.engine.draw import DrawParams, StopRule, UniformStream, draw_tokens
from twinkle_serve.protocol.data import SamplingParams


def params(
    temperature: float = 1.0, top_k: int = -1, top_p: float = 1.0, seed: int = 0, position: int = 0
) -> DrawParams:
    return DrawParams(temperature, top_k, top_p, UniformStream(seed, 0).at(position))


def expected_distribution(logits: torch.Tensor, temperature: float, top_k: int, top_p: float) -> torch.Tensor:
    """The definition: soften, keep the top_k likeliest, renormalise, keep the smallest nucleus of top_p."""
    p = torch.softmax(logits.double() / temperature, dim=0)
    order = p.argsort(descending=True, stable=True)
    kept = order[: top_k if top_k > 0 else len(p)]
    within = p[kept] / p[kept].sum()
    nucleus = [kept[0].item()]
    total = within[0].item()
    for token, mass in zip(kept[1:].tolist(), within[1:].tolist(), strict=True):
        if total >= top_p:
            break
        nucleus.append(token)
        total += mass
    result = torch.zeros_like(p)
    result[nucleus] = p[nucleus]
    return result / result.sum()


@pytest.mark.parametrize("vocab_size", [7, 1300])
@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"),
    [(1.0, -1, 1.0), (0.5, -1, 1.0), (2.0, 5, 1.0), (1.0, -1, 0.6), (0.8, 6, 0.7), (1.0, 1_200, 0.999)],
)
def test_frequencies_follow_the_definition(
    vocab_size: int, temperature: float, top_k: int, top_p: float
) -> None:
    draws = 6_000
    logits = 2 * torch.randn(vocab_size, generator=torch.Generator().manual_seed(1))
    rows = [params(temperature, top_k, top_p, seed=5, position=n) for n in range(draws)]
    drawn = draw_tokens(logits.repeat(draws, 1), rows)
    expected = expected_distribution(logits, temperature, top_k, top_p)
    counts = torch.bincount(drawn.tokens, minlength=vocab_size).double()
    assert not counts[expected == 0].any(), "a token outside the truncated distribution was drawn"
    # Pearson's statistic over tokens that are expected often enough, the others pooled into one cell.
    often = expected * draws >= 5
    cells = torch.cat([counts[often], counts[~often].sum()[None]])
    wanted = torch.cat([expected[often], expected[~often].sum()[None]]) * draws
    cells, wanted = cells[wanted > 0], wanted[wanted > 0]
    statistic = ((cells - wanted) ** 2 / wanted).sum().item()
    freedom = max(1, len(cells) - 1)
    assert statistic < freedom + 5 * math.sqrt(2 * freedom) + 5


@settings(max_examples=60, deadline=None)
@given(
    vocab_size=st.sampled_from([3, 100, 512, 513, 2000]),
    rows=st.lists(
        st.tuples(
            st.sampled_from([0.0, 0.3, 1.0, 1.7]),
            st.sampled_from([-1, 0, 1, 4, 5000]),
            st.sampled_from([0.0, 0.3, 0.95, 1.0]),
            st.integers(-(2**63), 2**63 - 1),
        ),
        min_size=1,
        max_size=9,
    ),
    scale=st.sampled_from([0.1, 3.0, 50.0]),
)
def test_a_row_draws_the_same_alone_and_in_any_batch(
    vocab_size: int, rows: list[tuple[float, int, float, int]], scale: float
) -> None:
    logits = scale * torch.randn(len(rows), vocab_size)
    drawing = [params(t, k, p, seed, position=n) for n, (t, k, p, seed) in enumerate(rows)]
    together = draw_tokens(logits.clone(), drawing, topk=2)
    assert together.topk is not None
    for n, (temperature, _, _, _) in enumerate(rows):
        alone = draw_tokens(logits[n : n + 1].clone(), [drawing[n]], topk=2)
        assert alone.topk is not None
        assert alone.tokens[0] == together.tokens[n]
        assert torch.equal(alone.logprobs[0], together.logprobs[n])
        assert np.array_equal(alone.topk.token_ids[0], together.topk.token_ids[n])
        reported = torch.log_softmax(logits[n].double() / (temperature or 1.0), dim=0)
        token = int(alone.tokens[0])
        assert alone.logprobs[0].item() == pytest.approx(reported[token].item(), abs=2e-5)
        assert (
            expected_distribution(logits[n], temperature or 1e-9, drawing[n].top_k, drawing[n].top_p)[token]
            > 0
        )


def test_temperature_zero_is_the_largest_logit_at_temperature_one() -> None:
    logits = torch.randn(6, 900)
    drawn = draw_tokens(logits.clone(), [params(0.0, top_k=3, top_p=0.1, seed=n) for n in range(6)])
    assert torch.equal(drawn.tokens, logits.argmax(dim=1))
    expected = torch.log_softmax(logits, dim=1).amax(dim=1)
    torch.testing.assert_close(drawn.logprobs, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("temperature", [5e-324, 1e-46, 1e-30, 1e-6, 1e30])
def test_extreme_temperatures_stay_finite(temperature: float) -> None:
    logits = torch.randn(3, 700) * 30
    drawn = draw_tokens(logits.clone(), [params(temperature, seed=n) for n in range(3)])
    assert drawn.logprobs.isfinite().all()
    if temperature < 1:
        assert torch.equal(drawn.tokens, logits.argmax(dim=1))


@pytest.mark.parametrize("uniform", [0.0, 1 - 2**-53])
@pytest.mark.parametrize("vocab_size", [5, 511, 512, 1025, 3000])
def test_the_ends_of_the_unit_interval_never_draw_an_impossible_token(
    uniform: float, vocab_size: int
) -> None:
    logits = torch.full((1, vocab_size), -math.inf)
    possible = [1, vocab_size // 2, vocab_size - 2]
    logits[0, possible] = torch.tensor([0.3, 0.0, -0.2])
    for top_k, top_p in ((-1, 1.0), (2, 1.0), (-1, 0.9)):
        drawn = draw_tokens(logits.clone(), [DrawParams(1.0, top_k, top_p, uniform)])
        assert drawn.tokens.item() in possible
        assert drawn.logprobs.isfinite().all()


def test_a_wide_nucleus_is_not_cut_at_the_candidates_sorted_first() -> None:
    """With 5,000 almost equal tokens, half of the mass is not among the best 1,024."""
    logits = 0.01 * torch.randn(1, 5000)
    rows = [params(1.0, top_p=0.5, position=n) for n in range(800)]
    tokens = draw_tokens(logits.repeat(800, 1), rows).tokens
    rank_of = torch.empty(5000, dtype=torch.int64)
    rank_of[logits[0].argsort(descending=True)] = torch.arange(5000)
    assert 2350 < int(rank_of[tokens].max()) < 2510


def test_top_p_is_a_share_of_what_a_wide_top_k_leaves() -> None:
    """220 of 1,100 equal tokens, whatever the neighbours' parameters are; not 819 of all 4,096."""
    rows = [DrawParams(1.0, 1_100, 0.2, (n + 0.5) / 1_100) for n in range(1_100)]
    assert draw_tokens(torch.zeros(1_100, 4096), rows).tokens.unique().numel() == 220
    rows += [params(1.0, top_p=0.9), params(1.0, top_k=5, top_p=0.5), params(1.0, top_k=2_000)]
    assert draw_tokens(torch.zeros(1_103, 4096), rows).tokens[:1_100].unique().numel() == 220


def test_reported_best_tokens_are_those_of_the_softened_distribution() -> None:
    logits = torch.randn(2, 40)
    drawn = draw_tokens(logits.clone(), [params(0.5, top_k=1), params(0.0)], topk=3)
    assert drawn.topk is not None
    for row, temperature in enumerate((0.5, 1.0)):
        best = torch.log_softmax(logits[row] / temperature, dim=0).topk(3)
        assert drawn.topk.token_ids[row].tolist() == best.indices.tolist()
        assert drawn.topk.logprobs[row].tolist() == pytest.approx(best.values.tolist(), abs=1e-5)


def test_more_best_tokens_than_words_leave_empty_cells() -> None:
    drawn = draw_tokens(torch.zeros(1, 2), [params()], topk=4)
    assert drawn.topk is not None
    assert drawn.topk.token_ids.shape == (1, 4)
    assert drawn.topk.logprobs[0, 2:].tolist() == [-99999.0, -99999.0]
    assert drawn.topk.token_ids[0, 2:].tolist() == [0, 0]


def test_logits_that_are_not_finite_show_in_the_logprob_of_their_row_only() -> None:
    logits = torch.randn(5, 600)
    logits[1, 3], logits[2, 4], logits[4] = math.nan, math.inf, math.nan
    clean = draw_tokens(logits[[0, 3]].clone(), [params(seed=1), params(seed=2, top_k=4)])
    rows = [params(seed=1), params(), params(top_p=0.5), params(seed=2, top_k=4), params(0.0)]
    drawn = draw_tokens(logits, rows, topk=2)
    assert drawn.logprobs.isnan().tolist() == [False, True, True, False, True]
    assert drawn.tokens[[0, 3]].tolist() == clean.tokens.tolist()
    assert ((drawn.tokens >= 0) & (drawn.tokens < 600)).all()


def test_random_numbers_are_in_the_unit_interval_and_differ_by_every_argument() -> None:
    seeds = (0, 1, -1, 2**63, 2**70 + 5)
    numbers = [UniformStream(s, i).at(p) for s in seeds for i in range(3) for p in range(40)]
    assert len(set(numbers)) == len(numbers)
    assert all(0 <= number < 1 for number in numbers)
    assert np.mean(numbers) == pytest.approx(0.5, abs=0.05)


def test_random_numbers_depend_on_the_position_and_not_on_what_was_asked_before() -> None:
    stream = UniformStream(7, 1)
    forward = [stream.at(position) for position in range(20)]
    assert [stream.at(position) for position in reversed(range(20))] == forward[::-1]


TEXTS = {0: "Hello", 1: " wor", 2: "ld", 3: "\n", 4: "\n\n", 5: "User", 6: ":", 7: " ", 8: "END"}


def decode(tokens: Sequence[int]) -> str:
    return "".join(TEXTS[token] for token in tokens)


def first_end(rule: StopRule, tokens: Sequence[int]) -> int | None:
    """How many tokens are kept; None if nothing stops."""
    return next((n for n, token in enumerate(tokens, start=1) if rule.ends(token)), None)


@pytest.mark.parametrize(
    ("stop_strings", "stop_ids", "tokens", "kept"),
    [
        ((), (), [0, 1, 2, 8], None),
        ((), (8, 3), [0, 1, 3, 8], 3),
        (("\n\nUser:",), (), [0, 3, 3, 5, 6, 0], 5),
        (("\n\nUser:",), (), [0, 4, 5, 6], 4),
        (("lo w",), (), [0, 1, 2], 2),
        (("o", "zzz"), (), [8, 0, 1], 2),
        (("world",), (8,), [0, 8, 1, 2], 2),
        (("END",), (), [0] * 100 + [8], 101),
        ((" wor",), (), [0, 2, 7, 1], 4),
    ],
)
def test_a_sample_ends_with_its_first_stop(
    stop_strings: tuple[str, ...], stop_ids: tuple[int, ...], tokens: list[int], kept: int | None
) -> None:
    rule = StopRule(SamplingParams(stop_strings=stop_strings, stop_token_ids=stop_ids), decode)
    assert first_end(rule, tokens) == kept


CHARACTERS = st.text(alphabet="ab é✓日😀\n", min_size=1, max_size=14)


@settings(max_examples=200, deadline=None)
@given(before=CHARACTERS, stop=CHARACTERS, after=CHARACTERS, present=st.booleans())
def test_a_stop_string_is_found_across_tokens_of_single_bytes(
    before: str, stop: str, after: str, present: bool
) -> None:
    """Byte-level tokens: a character is several tokens, and half of one decodes to a replacement mark."""
    data = (before + stop * present + after).encode()
    rule = StopRule(
        SamplingParams(stop_strings=(stop,)), lambda tokens: bytes(tokens).decode(errors="replace")
    )
    kept = first_end(rule, list(data))
    place = data.find(stop.encode())
    assert kept == (None if place < 0 else place + len(stop.encode()))


def test_the_real_tokenizer_finds_a_stop_string_wherever_its_tokens_begin(tiny_qwen3: object) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_qwen3)
    text = "First line.\nSecond: été 日本語 – done.\n\nHuman: more"
    tokens = tokenizer(text, add_special_tokens=False)["input_ids"]
    for stop in ("\n\nHuman:", "日本語", "té ", "done", "First"):
        rule = StopRule(SamplingParams(stop_strings=(stop,)), tokenizer.decode)
        kept = first_end(rule, tokens)
        assert kept is not None
        assert stop in tokenizer.decode(tokens[:kept])
        assert stop not in tokenizer.decode(tokens[: kept - 1])


def test_a_stop_string_may_begin_with_the_space_that_decoders_drop_at_the_start() -> None:
    """SentencePiece tokenizers drop the space of the first token they decode."""
    rule = StopRule(SamplingParams(stop_strings=(" ",)), lambda tokens: decode(tokens).removeprefix(" "))
    assert first_end(rule, [0, 2, 7, 0]) == 3


def test_a_token_costs_the_same_however_long_the_sample_is() -> None:
    longest = 0

    def counting(tokens: Sequence[int]) -> str:
        nonlocal longest
        longest = max(longest, len(tokens))
        return decode(tokens)

    rule = StopRule(SamplingParams(stop_strings=("END",)), counting)
    assert first_end(rule, [0] * 1000) is None
    assert longest < 20


def test_a_row_with_a_large_top_k_does_not_make_others_sort_as_much(monkeypatch: pytest.MonkeyPatch) -> None:
    widths: list[tuple[int, int]] = []
    topk = torch.Tensor.topk

    def noted(tensor: torch.Tensor, k: int, dim: int) -> object:
        widths.append((tensor.shape[0], k))
        return topk(tensor, k, dim)

    monkeypatch.setattr(torch.Tensor, "topk", noted)
    wide = DrawParams(1.0, 3_000, 0.9, 0.5)
    narrow = [DrawParams(1.0, 50, 0.9, 0.5), DrawParams(1.0, -1, 0.9, 0.5)]
    draw_tokens(
        torch.randn(3, 4_096, generator=torch.Generator().manual_seed(0)), [narrow[0], wide, narrow[1]]
    )
    assert (1, 3_000) in widths
    assert (2, 1_024) in widths
