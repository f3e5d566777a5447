"""Logprobs at prompt positions, computed from the hidden states of the prefill that serves the request.

Knows what a SampleRequest can ask about its prompt. Does not know batching or generated tokens (sampler.py).
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

from twinkle_serve.engine.base_model import BaseModel
from twinkle_serve.engine.draw import Drawn, DrawParams, UniformStream, draw_tokens
from twinkle_serve.engine.pulse import PULSE
from twinkle_serve.engine.sequences import Job, PromptScores
from twinkle_serve.engine.slots import Segment, trained_groups
from twinkle_serve.protocol.data import SamplingParams

_ALTERNATIVES = 2**32
"""Sample indices from here on are random streams of prompt alternatives, apart from those of samples."""


def score_prompt(base: BaseModel, job: Job, start: int, hidden: torch.Tensor) -> None:
    """Score what ``job`` asks for, as far as ``hidden`` [n, H] of positions ``start:start + n`` tells.

    The hidden state at position p scores prompt token p + 1. Positions past the prompt, or scored before (a
    sequence that was prefilled again), are passed over.
    """
    scores = job.scores
    if scores is None:
        return
    first = max(start, scores.scored_to, scores.first - 1)
    end = min(start + hidden.shape[0], job.prompt_length - 1)
    scores.scored_to = max(scores.scored_to, end)
    if first >= end:
        return
    told = max(first, scores.first_logprob - 1)
    if told < end:
        _score_tokens(base, job, scores, told, end, hidden[told - start : end - start])
    rows = hidden[first - start : end - start]
    if scores.targets is not None:
        _score_targets(base, job, scores.targets, first, end, rows)
    if scores.alternatives is not None:
        _draw_alternatives(base, job, scores, first, end, rows)


def _score_tokens(
    base: BaseModel, job: Job, scores: PromptScores, first: int, end: int, hidden: torch.Tensor
) -> None:
    """The prompt's own tokens, and the likeliest ones."""
    request, segments = job.request, _segments(job, hidden.shape[0])
    if request.prompt_logprobs:
        targets = torch.from_numpy(request.prompt[first + 1 : end + 1].astype(np.int64))
        logprobs = base.target_logprobs(hidden, segments, torch.arange(end - first), targets)
        scores.logprobs[first + 1 : end + 1] = logprobs.cpu().numpy()
        PULSE.beat()
    if scores.topk is not None:
        token_ids, logprobs = base.top_k_logprobs(hidden, segments, request.topk_prompt_logprobs)
        k = token_ids.shape[1]  # the vocabulary may be smaller than what was asked for
        scores.topk.token_ids[first + 1 : end + 1, :k] = token_ids.cpu().numpy()
        scores.topk.logprobs[first + 1 : end + 1, :k] = logprobs.cpu().numpy()
        PULSE.beat()


def _score_targets(
    base: BaseModel, job: Job, found: npt.NDArray[np.float32], first: int, end: int, hidden: torch.Tensor
) -> None:
    assert job.request.target_prompt_tokens is not None
    wanted = job.request.target_prompt_tokens[first:end]
    rows, columns = np.nonzero(wanted >= 0)
    tokens = torch.from_numpy(wanted[rows, columns])
    logprobs = base.target_logprobs(hidden, _segments(job, hidden.shape[0]), torch.from_numpy(rows), tokens)
    found[first + rows, columns] = logprobs.cpu().numpy()
    PULSE.beat()


def _segments(job: Job, num_rows: int) -> list[Segment]:
    if job.adapter is None or "unembed" not in trained_groups(job.adapter.spec):
        return []
    return [Segment(job.adapter, 0, num_rows)]


def _draw_alternatives(
    base: BaseModel, job: Job, scores: PromptScores, first: int, end: int, hidden: torch.Tensor
) -> None:
    """k independent draws at each position at the request's temperature, a few rows of logits at a time."""
    assert scores.alternatives is not None
    k, most_rows = job.request.prompt_alt_tokens_k, base.config.logits_chunk_tokens
    streams = [UniformStream(job.seed, _ALTERNATIVES + draw) for draw in range(k)]
    # A draw overwrites its logits, so a position's own are kept beside a copy for each.
    at_once = min(k, max(1, most_rows - 1))
    step = max(1, most_rows // (1 + at_once))
    for position in range(first, end, step):
        rows = hidden[position - first : min(position + step, end) - first]
        logits = base.full_logits(rows, _segments(job, rows.shape[0]))
        for draw in range(0, k, at_once):
            part = streams[draw : draw + at_once]
            drawn = _draw_each(logits, job.request.params, part, position)
            places = slice(position, position + rows.shape[0]), slice(draw, draw + len(part))
            scores.alternatives.token_ids[places] = drawn.tokens.view(-1, len(part)).cpu().numpy()
            scores.alternatives.logprobs[places] = drawn.logprobs.view(-1, len(part)).cpu().numpy()
            PULSE.beat()


def _draw_each(
    logits: torch.Tensor, params: SamplingParams, streams: list[UniformStream], position: int
) -> Drawn:
    """One draw from each stream at each row of ``logits`` [n, V], that of the prompt's ``position`` first:
    row by row, [n * len(streams)]."""
    draws = [
        DrawParams(params.temperature, params.top_k, params.top_p, stream.at(position + row))
        for row in range(logits.shape[0])
        for stream in streams
    ]
    return draw_tokens(logits.repeat_interleave(len(streams), 0), draws)
