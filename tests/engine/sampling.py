"""Short ways to sample, and to check what was sampled against logits of the whole sequence."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from tests.engine import reference
from tests.engine.ticks import (
    create,
    forward_backward,
    optim_step,
    random_batch,
    run,
    snapshot,
    tensors,
    value,
)
from twinkle_serve.engine.engine import Engine
from twinkle_serve.engine.kv_cache import BLOCK_TOKENS
from twinkle_serve.protocol.data import LoraSpec, SampledSequence, SampleResult
from twinkle_serve.protocol.work import AdapterRef, Sample, Tick, TickReport

PROMPT = [5, 7, 9, 11, 3]


def assert_nothing_left(engine: Engine) -> None:
    report = list(engine.run(Tick(2)))[-1]
    assert isinstance(report, TickReport)
    assert report.active_samples == 0
    assert report.gauges["kv_blocks_free"] == engine.base.config.sampler.kv_cache_tokens // BLOCK_TOKENS


def drain(engine: Engine, samples: Sequence[Sample]) -> dict[str, SampleResult]:
    return {name: value(o) for name, o in run(engine, samples=tuple(samples), decode_budget_s=120).items()}


def trained(engine: Engine, slot: int, spec: LoraSpec, name: str) -> AdapterRef:
    """A snapshot of an adapter after two steps."""
    create(engine, slot, spec, moved=True)
    rng = np.random.default_rng(spec.seed)
    for _ in range(2):
        forward_backward(engine, slot, random_batch(rng, [8, 5]))
        optim_step(engine, slot)
    return snapshot(engine, slot, name)


def dense(engine: Engine, slot: int, directory: Path) -> reference.DenseAdapter:
    return reference.DenseAdapter(reference.load_model(directory), tensors(engine, slot))


def greedy(logits: reference.Logits, prompt: list[int], count: int) -> list[int]:
    tokens = list(prompt)
    with torch.no_grad():
        for _ in range(count):
            tokens.append(int(logits(torch.tensor(tokens))[-1].argmax()))
    return tokens[len(prompt) :]


def assert_logprobs(
    logits: reference.Logits, prompt: list[int], sequence: SampledSequence, temperature: float = 1.0
) -> None:
    """Each reported logprob is that of its token under the whole distribution at this temperature."""
    tokens = torch.tensor([*prompt, *sequence.tokens.tolist()])
    with torch.no_grad():
        logprobs = torch.log_softmax(logits(tokens) / temperature, -1)
    expected = [logprobs[len(prompt) - 1 + i, t] for i, t in enumerate(sequence.tokens.tolist())]
    np.testing.assert_allclose(sequence.logprobs, expected, atol=1e-4, rtol=0)
