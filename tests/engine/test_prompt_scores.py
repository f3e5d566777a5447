"""What is reported about a prompt, against Hugging Face's logits of the whole prompt."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.engine import reference
from tests.engine.conftest import EngineFactory
from tests.engine.ticks import VOCAB_SIZE, create, make_sample, run, sample, snapshot, tensors, value
from twinkle_serve.engine import prompt_scores
from twinkle_serve.engine.base_model import BaseModel
from twinkle_serve.engine.draw import Drawn, draw_tokens
from twinkle_serve.engine.engine import Engine
from twinkle_serve.engine.pulse import PULSE
from twinkle_serve.model_config import SamplerConfig
from twinkle_serve.protocol.data import Listed, LoraSpec, SampleResult, TopK

PROMPT = np.random.default_rng(3).integers(0, VOCAB_SIZE, 41).tolist()


@pytest.fixture
def chunked(engine_for: EngineFactory, tiny_moe: Path) -> Engine:
    """Prompts take three steps, logits come in small chunks."""
    return engine_for(tiny_moe, sampler=SamplerConfig(prefill_chunk_tokens=16), logits_chunk_tokens=7)


@pytest.fixture
def logprobs(tiny_moe: Path) -> np.ndarray:
    """float32 [P, V] of the base model: row p is about the token after position p."""
    with torch.no_grad():
        logits = reference.load_model(tiny_moe)(torch.tensor([PROMPT])).logits[0]
    return torch.log_softmax(logits, -1).numpy()


def actual(logprobs: np.ndarray) -> np.ndarray:
    """What prompt_logprobs should be."""
    rows = [np.nan, *(logprobs[p - 1, PROMPT[p]] for p in range(1, len(PROMPT)))]
    return np.array(rows, np.float32)


def test_prompt_logprobs(chunked: Engine, logprobs: np.ndarray) -> None:
    found = sample(chunked, PROMPT, max_tokens=1, prompt_logprobs=True)
    np.testing.assert_allclose(found.prompt_logprobs, actual(logprobs), atol=1e-4)
    assert (found.topk_prompt, found.target_prompt_logprobs, found.prompt_alternatives) == (None,) * 3


def test_nothing_is_reported_unasked(chunked: Engine) -> None:
    found = sample(chunked, PROMPT, max_tokens=1)
    assert found.prompt_logprobs is None
    assert sample(chunked, PROMPT, max_tokens=1, topk_prompt_logprobs=1).prompt_logprobs is None


@pytest.mark.parametrize("adapter_flags", [{}, {"train_unembed": False}])
def test_with_an_adapter(adapter_flags: dict[str, Any], chunked: Engine, tiny_moe: Path) -> None:
    create(chunked, 0, LoraSpec(rank=6, seed=1, **adapter_flags), moved=True)
    ref = snapshot(chunked, 0, f"scores{len(adapter_flags)}")
    dense = reference.DenseAdapter(reference.load_model(tiny_moe), tensors(chunked, 0))
    with torch.no_grad():
        logprobs = torch.log_softmax(dense.logits(torch.tensor(PROMPT)), -1).numpy()
    found = sample(chunked, PROMPT, ref, max_tokens=1, prompt_logprobs=True, topk_prompt_logprobs=3)
    np.testing.assert_allclose(found.prompt_logprobs, actual(logprobs), atol=1e-4)
    assert found.topk_prompt is not None
    np.testing.assert_allclose(found.topk_prompt.logprobs[1:], np.sort(logprobs)[:-1, :-4:-1], atol=1e-4)


def test_topk_prompt_logprobs(chunked: Engine, logprobs: np.ndarray) -> None:
    found = sample(chunked, PROMPT, max_tokens=1, topk_prompt_logprobs=4).topk_prompt
    assert found is not None
    assert found.token_ids.shape == found.logprobs.shape == (len(PROMPT), 4)
    assert found.token_ids[0].tolist() == [0] * 4
    assert found.logprobs[0].tolist() == [-99999.0] * 4
    np.testing.assert_array_equal(found.token_ids[1:], np.argsort(-logprobs[:-1])[:, :4])
    np.testing.assert_allclose(found.logprobs[1:], -np.sort(-logprobs[:-1])[:, :4], atol=1e-4)


def test_more_than_the_vocabulary_leaves_empty_cells(chunked: Engine) -> None:
    found = sample(chunked, PROMPT[:3], max_tokens=1, topk_prompt_logprobs=VOCAB_SIZE + 2).topk_prompt
    assert found is not None
    assert found.logprobs[1:, VOCAB_SIZE:].tolist() == [[-99999.0] * 2] * 2
    assert (found.logprobs[1:, :VOCAB_SIZE] > -100).all()


def test_target_prompt_logprobs(chunked: Engine, logprobs: np.ndarray) -> None:
    wanted = np.random.default_rng(4).integers(0, VOCAB_SIZE, (len(PROMPT) - 1, 3))
    wanted[5, 1] = wanted[17] = -1
    found = sample(chunked, PROMPT, max_tokens=1, target_prompt_tokens=wanted).target_prompt_logprobs
    expected = np.take_along_axis(logprobs[:-1], np.maximum(wanted, 0), 1)
    np.testing.assert_allclose(found, np.where(wanted < 0, 0.0, expected), atol=1e-4)


@pytest.mark.parametrize("last_n", [0, 1, 10, 30, 40, 41, 99])
def test_only_the_last_n(last_n: int, chunked: Engine, logprobs: np.ndarray) -> None:
    found = sample(
        chunked, PROMPT, max_tokens=1, prompt_logprobs=True, prompt_logprobs_last_n=last_n
    ).prompt_logprobs
    expected = actual(logprobs)
    expected[: max(1, len(PROMPT) - last_n)] = np.nan
    np.testing.assert_allclose(found, expected, atol=1e-4)


def test_only_the_last_n_leaves_targets_and_alternatives_whole(chunked: Engine, logprobs: np.ndarray) -> None:
    wanted = np.full((len(PROMPT) - 1, 2), 5)
    fields = {"target_prompt_tokens": wanted, "prompt_alt_tokens_k": 3, "seed": 1}
    found = sample(
        chunked,
        PROMPT,
        max_tokens=1,
        prompt_logprobs=True,
        topk_prompt_logprobs=2,
        prompt_logprobs_last_n=4,
        **fields,
    )
    expected = actual(logprobs)
    expected[:-4] = np.nan
    np.testing.assert_allclose(found.prompt_logprobs, expected, atol=1e-4)
    assert found.topk_prompt is not None
    assert (found.topk_prompt.logprobs[:-4] == -99999).all()
    assert (found.topk_prompt.logprobs[-4:] > -99999).all()
    np.testing.assert_allclose(found.target_prompt_logprobs, logprobs[:-1, [5, 5]], atol=1e-4)
    whole = sample(chunked, PROMPT, max_tokens=1, **fields).prompt_alternatives
    assert found.prompt_alternatives is not None
    assert whole is not None
    np.testing.assert_array_equal(found.prompt_alternatives.token_ids, whole.token_ids)


def test_targets_are_told_with_their_cells_and_what_is_before_them_may_be_cached(
    chunked: Engine, logprobs: np.ndarray
) -> None:
    wanted = np.full((len(PROMPT) - 1, 2), -1)
    wanted[35] = 5, 6
    cells = Listed(np.array([0] * 36 + [2] * 5), np.array([0, 1]))
    sample(chunked, PROMPT, max_tokens=1)
    found = sample(chunked, PROMPT, max_tokens=1, target_prompt_tokens=wanted, target_cells=cells)
    assert found.target_cells is cells
    assert found.target_prompt_logprobs is not None
    np.testing.assert_allclose(cells.of(found.target_prompt_logprobs), logprobs[35, 5:7], atol=1e-4)
    assert np.count_nonzero(found.target_prompt_logprobs) == 2
    assert 0 < found.prompt_cache_hit_tokens <= 35


def test_targets_that_name_nothing_are_zeros(chunked: Engine) -> None:
    wanted = np.full((len(PROMPT) - 1, 2), -1)
    found = sample(chunked, PROMPT, max_tokens=1, target_prompt_tokens=wanted).target_prompt_logprobs
    assert found is not None
    assert found.shape == wanted.shape
    assert not found.any()


def test_alternatives_are_draws_at_the_temperature(chunked: Engine, logprobs: np.ndarray) -> None:
    k = 60
    found = sample(
        chunked, PROMPT, max_tokens=1, prompt_alt_tokens_k=k, temperature=0.5, seed=3
    ).prompt_alternatives
    assert found is not None
    assert found.token_ids.shape == (len(PROMPT) - 1, k)
    sharp = 2 * logprobs[:-1]
    sharp -= np.log(np.exp(sharp).sum(1, keepdims=True))
    np.testing.assert_allclose(found.logprobs, np.take_along_axis(sharp, found.token_ids, 1), atol=2e-4)
    # Draws, not the best ones, and different ones at each position: their mean surprise is the entropy.
    entropy = -(np.exp(sharp) * sharp).sum()
    assert -found.logprobs.sum() / k == pytest.approx(entropy, rel=0.1)
    assert len({tuple(row) for row in found.token_ids}) == len(PROMPT) - 1


@pytest.mark.parametrize("k", [1, 4, 6, 7, 60])
def test_drawing_alternatives_keeps_few_rows_and_shows_that_it_gets_on(
    k: int, chunked: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, drawn, original = [0], [], BaseModel.full_logits

    def full_logits(*args: Any) -> torch.Tensor:
        logits = original(*args)
        made[0] = logits.shape[0]
        return logits

    def draw(logits: torch.Tensor, *args: Any) -> Drawn:
        drawn.append((made[0] + logits.shape[0], PULSE.count))
        return draw_tokens(logits, *args)

    monkeypatch.setattr(BaseModel, "full_logits", full_logits)
    monkeypatch.setattr(prompt_scores, "draw_tokens", draw)
    sample(chunked, PROMPT, max_tokens=1, prompt_alt_tokens_k=k)
    assert max(rows for rows, _ in drawn) <= 7
    assert len(drawn) >= k * (len(PROMPT) - 1) // 7
    assert all(after > before for (_, before), (_, after) in pairwise(drawn))


def test_each_kind_of_score_is_a_sign_of_life(chunked: Engine) -> None:
    def beats(first_token: int, **fields: Any) -> int:
        before = PULSE.count
        # A beginning of its own, so that nothing is cached and all have as many layers to go through.
        sample(chunked, [first_token, *PROMPT[1:]], max_tokens=1, **fields)
        return PULSE.count - before

    wanted = np.zeros((len(PROMPT) - 1, 1), np.int64)
    none = beats(0)
    assert beats(1, prompt_logprobs=True) == none + 3
    assert beats(2, topk_prompt_logprobs=2) == none + 3
    assert beats(3, target_prompt_tokens=wanted) == none + 3


def test_alternatives_are_seeded_and_apart_from_the_samples(chunked: Engine) -> None:
    def draws(**fields: Any) -> TopK:
        found = sample(chunked, PROMPT, max_tokens=1, prompt_alt_tokens_k=5, **fields).prompt_alternatives
        assert found is not None
        return found

    assert draws(seed=1).token_ids.tolist() == draws(seed=1, num_samples=3).token_ids.tolist()
    assert draws(seed=1).token_ids.tolist() != draws(seed=2).token_ids.tolist()


def test_everything_at_once_beside_others(chunked: Engine, logprobs: np.ndarray) -> None:
    wanted = np.tile(np.arange(2), (len(PROMPT) - 1, 1))
    fields = {
        "prompt_logprobs": True,
        "topk_prompt_logprobs": 2,
        "target_prompt_tokens": wanted,
        "prompt_alt_tokens_k": 3,
        "seed": 5,
    }
    names = [f"{i}" for i in range(3)]
    samples = [make_sample(name, PROMPT, max_tokens=2, num_samples=2, **fields) for name in names]
    samples.insert(1, make_sample("short", PROMPT[:2], max_tokens=9, prompt_logprobs=True))
    found = run(chunked, samples=tuple(samples), decode_budget_s=60)
    alone = sample(chunked, PROMPT, max_tokens=2, num_samples=2, **fields)
    for name in names:
        result: SampleResult = value(found[name])
        np.testing.assert_allclose(result.prompt_logprobs, actual(logprobs), atol=1e-4)
        np.testing.assert_allclose(result.target_prompt_logprobs, logprobs[:-1, :2], atol=1e-4)
        for one, other in (
            (result.topk_prompt, alone.topk_prompt),
            (result.prompt_alternatives, alone.prompt_alternatives),
        ):
            assert one is not None
            assert other is not None
            np.testing.assert_array_equal(one.token_ids, other.token_ids)
    np.testing.assert_allclose(
        value(found["short"]).prompt_logprobs, [np.nan, actual(logprobs)[1]], atol=1e-4
    )


def test_a_prompt_of_one_token_has_no_scores(chunked: Engine) -> None:
    found = sample(
        chunked, [7], max_tokens=2, prompt_logprobs=True, topk_prompt_logprobs=2, prompt_alt_tokens_k=2
    )
    assert found.prompt_logprobs is not None
    assert np.isnan(found.prompt_logprobs).tolist() == [True]
    assert found.prompt_alternatives is not None
    assert found.prompt_alternatives.token_ids.shape == (0, 2)
    assert len(found.sequences[0].tokens) == 2
