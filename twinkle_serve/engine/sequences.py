"""A sampling request on its way: its sequences, and what has been scored of its prompt.

Knows tokens, lengths and when a sequence ends. Does not know the model, the KV cache's blocks or how a token
is drawn (draw.py).
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from twinkle_serve.engine.adapter_pool import Pooled
from twinkle_serve.engine.draw import DrawParams, StopRule, UniformStream
from twinkle_serve.engine.kv_cache import Rows
from twinkle_serve.engine.slots import Adapter
from twinkle_serve.protocol.data import (
    SampleDelta,
    SampledSequence,
    SampleRequest,
    SampleResult,
    SamplingParams,
    TopK,
)
from twinkle_serve.protocol.work import Sample

EMPTY_TOPK = (0, -99999.0)


@dataclass(eq=False, slots=True)
class PromptScores:
    """Logprobs asked for at prompt positions, NaN or empty until scored. ``first`` is the first position
    wanted, ``first_logprob`` that of ``logprobs`` and ``topk``; the logprob of prompt token p comes from the
    hidden state at p - 1, and hidden states before ``scored_to`` have been used."""

    request: SampleRequest
    first: int
    first_logprob: int
    logprobs: npt.NDArray[np.float32]
    topk: TopK | None
    targets: npt.NDArray[np.float32] | None
    alternatives: TopK | None
    scored_to: int = 0

    @classmethod
    def of(cls, request: SampleRequest) -> PromptScores | None:
        """None if nothing is asked for."""
        length, k, draws = len(request.prompt), request.topk_prompt_logprobs, request.prompt_alt_tokens_k
        last_n, targets = request.prompt_logprobs_last_n, request.target_prompt_tokens
        first_logprob = 1 if last_n is None else max(1, length - last_n)
        firsts = []
        if request.prompt_logprobs or k > 0:
            firsts.append(first_logprob)
        if targets is not None:
            named = (targets >= 0).any(axis=1)
            firsts.append(1 + int(named.argmax()) if named.any() else length)
        if draws > 0:
            firsts.append(1)
        if not firsts:
            return None
        return cls(
            request=request,
            first=min(firsts),
            first_logprob=first_logprob,
            logprobs=np.full(length, np.nan, np.float32),
            topk=_empty_topk(length, k) if k > 0 else None,
            targets=None if targets is None else np.zeros(targets.shape, np.float32),
            alternatives=_empty_topk(length - 1, draws) if draws > 0 else None,
        )


def _empty_topk(length: int, k: int) -> TopK:
    token, logprob = EMPTY_TOPK
    return TopK(np.full((length, k), token, np.int32), np.full((length, k), logprob, np.float32))


@dataclass(eq=False, slots=True)
class Sequence:
    """One sample: the prompt's tokens followed by its own, of which the first ``rows.length`` are cached."""

    job: Job
    index: int
    tokens: list[int]
    stop: StopRule
    uniforms: UniformStream
    rows: Rows = field(default_factory=Rows)
    logprobs: list[float] = field(default_factory=list)
    topk_ids: list[npt.NDArray[np.int32]] = field(default_factory=list)
    topk_logprobs: list[npt.NDArray[np.float32]] = field(default_factory=list)
    stop_reason: str | None = None
    num_told: int = 0
    # What every step asks for, at hand.
    params: SamplingParams = field(init=False)
    topk: int = field(init=False)
    prompt_length: int = field(init=False)

    def __post_init__(self) -> None:
        request = self.job.request
        self.params, self.topk = request.params, request.topk_sample_logprobs
        self.prompt_length = len(request.prompt)

    @property
    def tenant(self) -> str:
        return self.job.sample.tenant

    @property
    def num_rows(self) -> int:
        """In a batch: until it ends."""
        return int(self.stop_reason is None)

    @property
    def num_generated(self) -> int:
        return len(self.tokens) - self.prompt_length

    @property
    def num_uncached(self) -> int:
        return len(self.tokens) - self.rows.length

    def next_draw(self) -> DrawParams:
        """How its next token is drawn."""
        params = self.params
        position = len(self.tokens) - self.prompt_length
        uniform = 0.0 if params.temperature == 0 else self.uniforms.at(position)
        return DrawParams(params.temperature, params.top_k, params.top_p, uniform)

    def append(self, token: int, logprob: float) -> None:
        """Add a drawn token; sets ``stop_reason`` if it is the last one."""
        self.tokens.append(token)
        self.logprobs.append(logprob)
        if self.stop.ends(token):
            self.stop_reason = "stop"
        elif len(self.tokens) - self.prompt_length >= self.job.max_tokens:
            self.stop_reason = "length"

    def result(self) -> SampledSequence:
        assert self.stop_reason is not None
        return SampledSequence(*self._drawn(0), stop_reason=self.stop_reason, topk=self._topk(0))

    def news(self) -> SampleDelta:
        """What was drawn since this was last asked."""
        start, self.num_told = self.num_told, self.num_generated
        return SampleDelta(self.index, *self._drawn(start), self._topk(start))

    def _drawn(self, start: int) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.float32]]:
        tokens = self.tokens[self.job.prompt_length + start :]
        return np.asarray(tokens, np.int32), np.asarray(self.logprobs[start:], np.float32)

    def _topk(self, start: int) -> TopK | None:
        if not self.topk_ids:
            return None
        return TopK(np.stack(self.topk_ids[start:]), np.stack(self.topk_logprobs[start:]))


@dataclass(eq=False, slots=True)
class Job:
    """One sampling request. ``max_tokens`` is bounded by context and cache; ``seed`` is always a number.

    scores: None until it starts, and if nothing is asked about its prompt. pooled: its adapter, from its
    admission on; None for the base model.
    """

    sample: Sample
    max_tokens: int
    seed: int
    scores: PromptScores | None = None
    pooled: Pooled | None = None
    sequences: list[Sequence] = field(default_factory=list)
    num_cached_tokens: int = 0
    told_at: float = 0.0

    @property
    def tenant(self) -> str:
        return self.sample.tenant

    @property
    def num_rows(self) -> int:
        """Of its samples, those that are not over."""
        return self.request.num_samples - sum(s.stop_reason is not None for s in self.sequences)

    @property
    def adapter(self) -> Adapter | None:
        return None if self.pooled is None else self.pooled.adapter

    @property
    def place(self) -> int:
        """What batches are sorted by: where in the pool the adapter is. The base model comes first."""
        return -1 if self.pooled is None else self.pooled.first

    @property
    def owner(self) -> str:
        """Whose sequences may share cached prefixes: one tenant's, with one adapter."""
        adapter = self.sample.adapter
        return f"{self.tenant}\0{'' if adapter is None else adapter.adapter}"

    @property
    def reusable_tokens(self) -> int:
        """Prompt tokens whose hidden states are not needed: they are not scored, and not the last."""
        return self.prompt_length - 1 if self.scores is None else self.scores.first - 1

    @property
    def request(self) -> SampleRequest:
        return self.sample.request

    @property
    def prompt_length(self) -> int:
        return len(self.sample.request.prompt)

    @property
    def done(self) -> bool:
        return len(self.sequences) == self.request.num_samples and all(
            sequence.stop_reason is not None for sequence in self.sequences
        )

    def used(self) -> dict[str, float]:
        """Tokens read and drawn so far, for what is ended before it has a result."""
        drawn = sum(sequence.num_generated for sequence in self.sequences)
        read = self.prompt_length if drawn else sum(sequence.rows.length for sequence in self.sequences[:1])
        return {"prompt_tokens": float(read), "sampled_tokens": float(drawn)}

    def news(self) -> tuple[SampleDelta, ...]:
        """What its sequences have drawn since this was last asked."""
        return tuple(s.news() for s in self.sequences if s.num_generated > s.num_told)

    def result(self) -> SampleResult:
        scores, wants_logprobs = self.scores, self.request.prompt_logprobs
        return SampleResult(
            sequences=tuple(sequence.result() for sequence in self.sequences),
            prompt_logprobs=scores.logprobs if scores is not None and wants_logprobs else None,
            topk_prompt=scores.topk if scores is not None else None,
            target_prompt_logprobs=scores.targets if scores is not None else None,
            target_cells=self.request.target_cells,
            prompt_alternatives=scores.alternatives if scores is not None else None,
            prompt_cache_hit_tokens=self.num_cached_tokens,
        )
