"""Streamed samples: what is told on the way is the beginning of what comes at the end."""

from __future__ import annotations

import numpy as np
import pytest

from tests.engine.ticks import make_sample
from twinkle_serve.engine import sampler
from twinkle_serve.engine.engine import Engine
from twinkle_serve.protocol.data import SampleResult
from twinkle_serve.protocol.work import Outcome, Progress, Sample, Tick


def streamed(engine: Engine, stream: bool, budget_s: float) -> tuple[list[Progress], SampleResult]:
    plain = make_sample("s", [5, 7, 9], max_tokens=40, num_samples=3, topk_sample_logprobs=2)
    samples: tuple[Sample, ...] = (Sample("s", "t", None, plain.request, stream),)
    told: list[Progress] = []
    tick_id = 1
    while True:
        for item in engine.run(Tick(tick_id, samples=samples, decode_budget_s=budget_s)):
            if isinstance(item, Progress):
                told.append(item)
            elif isinstance(item, Outcome):
                assert item.failure is None, item.failure
                return told, item.value
        samples, tick_id = (), tick_id + 1


@pytest.mark.parametrize("budget_s", [1e-6, 60.0])
def test_progress_is_a_prefix_of_the_result(
    moe: Engine, monkeypatch: pytest.MonkeyPatch, budget_s: float
) -> None:
    monkeypatch.setattr(sampler, "_TELL_EVERY_S", 0.0)
    told, result = streamed(moe, True, budget_s)
    assert len(told) > 10
    for index, sequence in enumerate(result.sequences):
        deltas = [delta for item in told for delta in item.deltas if delta.index == index]
        tokens = np.concatenate([delta.tokens for delta in deltas])
        assert sequence.tokens[: len(tokens)].tolist() == tokens.tolist()
        assert len(sequence.tokens) - len(tokens) <= 1
        logprobs = np.concatenate([delta.logprobs for delta in deltas])
        np.testing.assert_array_equal(logprobs, sequence.logprobs[: len(tokens)])
        assert sequence.topk is not None
        ids = np.concatenate([delta.topk.token_ids for delta in deltas if delta.topk is not None])
        np.testing.assert_array_equal(ids, sequence.topk.token_ids[: len(tokens)])


def test_progress_comes_at_a_bounded_pace_and_only_when_asked_for(
    moe: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sampler, "_TELL_EVERY_S", 1e9)
    told, _ = streamed(moe, True, 60.0)
    assert len(told) == 0 or len(told) == 1
    monkeypatch.setattr(sampler, "_TELL_EVERY_S", 0.0)
    assert streamed(moe, False, 60.0)[0] == []
