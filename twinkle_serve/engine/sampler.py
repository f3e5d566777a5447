"""The sampler: continuous batching on the training weights, many adapters in one decode batch.

One step prefills a bounded chunk of waiting prompts, then decodes one token of every running sequence. When
the KV cache is full the youngest sequence gives its blocks up and is prefilled again later. Knows sequences,
blocks and adapters; does not know whose turn it is (turns.py) or when the next tick comes.
"""

from __future__ import annotations

import logging
import math
import random
import time
from collections import Counter, deque
from collections.abc import Iterator
from collections.abc import Sequence as SequenceOf
from pathlib import Path

import torch

from twinkle_serve.engine.adapter_pool import PoolFull
from twinkle_serve.engine.base_model import BaseModel
from twinkle_serve.engine.draw import StopRule, UniformStream, draw_tokens
from twinkle_serve.engine.kv_cache import BLOCK_TOKENS, DecodeAttend, KVCache, OutOfBlocks, PrefillAttend
from twinkle_serve.engine.prefixes import remember, reuse
from twinkle_serve.engine.prompt_scores import score_prompt
from twinkle_serve.engine.sample_adapters import SampleAdapters
from twinkle_serve.engine.sample_pass import SamplePass
from twinkle_serve.engine.sequences import Job, PromptScores, Sequence
from twinkle_serve.engine.sharding.ranks import ends_rank
from twinkle_serve.engine.text import TokenText
from twinkle_serve.engine.turns import Turns, in_the_way_of, is_crowded, rows_of, youngest_of_most
from twinkle_serve.model_config import SamplerConfig
from twinkle_serve.protocol.work import Failure, Outcome, Progress, Sample
from twinkle_serve.storage.checkpoints import CheckpointError

logger = logging.getLogger(__name__)

# A reader sees no gaps at this pace, and each message costs the coordinator about a millisecond.
_TELL_EVERY_S = 0.05


class Sampler:
    """Admits samples, decodes them together, yields a request's SampleResult when its last sequence ends."""

    def __init__(
        self, base: BaseModel, adapters: SampleAdapters, config: SamplerConfig, directory: Path
    ) -> None:
        self._base = base
        self._adapters = adapters
        self._config = config
        self._text = TokenText(directory)
        self._pass = SamplePass(base, adapters.pool)
        shape = base.model.config
        self._cache = KVCache(
            num_layers=shape.num_hidden_layers,
            num_tokens=config.kv_cache_tokens,
            kv_heads=shape.num_key_value_heads,
            head_dim=getattr(shape, "head_dim", None) or shape.hidden_size // shape.num_attention_heads,
            dtype=base.dtype,
            device=base.device,
        )
        self._turns = Turns()
        self._waiting: deque[Job] = deque()
        self._running: dict[str, Job] = {}
        self._prefilling: deque[Sequence] = deque()
        self._decoding: list[Sequence] = []
        self._ended: list[Sequence] = []
        self._pool_is_full = False
        # How many rows share a product decides how it rounds, so in deterministic mode nothing is shared.
        self._isolated = base.config.deterministic

    @property
    def num_active(self) -> int:
        """Requests admitted and not yet answered."""
        return len(self._waiting) + len(self._running)

    @property
    def cache(self) -> KVCache:
        return self._cache

    @property
    def num_blocks(self) -> int:
        return self._cache.num_blocks

    @property
    def num_free_blocks(self) -> int:
        return self._cache.num_free

    def run(
        self, cancels: SequenceOf[str], samples: SequenceOf[Sample], budget_s: float
    ) -> Iterator[Outcome | Progress]:
        """Drop ``cancels``, admit ``samples``, then step until ``budget_s`` has passed or nothing is left."""
        for request_id in cancels:
            yield from self._cancel(request_id)
        for sample in samples:
            try:
                self._enter(self._job(sample))
            except (ValueError, OSError) as error:
                yield refusal(sample, error)
        deadline = time.perf_counter() + budget_s
        while self.num_active and budget_s > 0:
            try:
                yield from self._step()
            except Exception as error:
                if ends_rank(error):
                    raise
                logger.exception("a sampling step failed")
                yield from self._abort()
            yield from self._progress()
            if time.perf_counter() >= deadline:
                return

    def _job(self, sample: Sample) -> Job:
        request = sample.request
        context, length = self._base.info.max_context_length, len(request.prompt)
        if length > context:
            raise ValueError(f"prompt has {length} tokens; this model's context holds {context}")
        if length > self._cache.capacity:
            raise ValueError(f"prompt has {length} tokens; the sampler's cache holds {self._cache.capacity}")
        # A prompt may fill either, as an answer may have done that is now scored: the last token drawn is
        # never read.
        room = max(1, min(context, self._cache.capacity) - length)
        if request.params.stop_strings:
            self._text.load()
        wanted = request.params.max_tokens
        seed = request.params.seed
        return Job(
            sample=sample,
            max_tokens=room if wanted is None else min(room, wanted),
            seed=random.getrandbits(63) if seed is None else seed,
        )

    def _enter(self, job: Job) -> None:
        self._turns.enter(job.tenant, {other.tenant for other in (*self._waiting, *self._running.values())})
        self._waiting.append(job)

    def _cancel(self, request_id: str) -> list[Outcome]:
        """What a request had used, if it had begun."""
        self._waiting = deque(job for job in self._waiting if job.sample.request_id != request_id)
        self._pool_is_full = False  # it may have been the one that waits for room
        job = self._running.pop(request_id, None)
        if job is None:
            return []
        used = job.used()
        self._forget(job)
        return [Outcome(request_id, failure=Failure("cancelled"), metrics=used)]

    def _forget(self, job: Job) -> None:
        self._let_go(job)
        for sequence in job.sequences:
            self._cache.release(sequence.rows)
        self._prefilling = deque(s for s in self._prefilling if s.job is not job)
        self._decoding = [s for s in self._decoding if s.job is not job]

    def _abort(self) -> Iterator[Outcome]:
        """Answer everything that was in a step that failed; nothing of it may stay in the cache."""
        for request_id, job in list(self._running.items()):
            self._forget(job)
            del self._running[request_id]
            yield Outcome(request_id, failure=Failure("internal error while sampling", "server"))

    def _let_go(self, job: Job) -> None:
        if job.pooled is not None and self._adapters.let_go(job.pooled):
            self._pool_is_full = False

    def _step(self) -> Iterator[Outcome]:
        yield from self._admit()
        with torch.no_grad():
            chunks = self._plan_prefill()
            if chunks:
                self._prefill(chunks)
            yield from self._finished()
            if self._decoding and self._make_room():
                self._decode()
            yield from self._finished()

    def _progress(self) -> Iterator[Progress]:
        """What there is to tell of streamed requests that are still running."""
        now = time.perf_counter()
        for request_id, job in self._running.items():
            if job.sample.stream and now - job.told_at >= _TELL_EVERY_S and (news := job.news()):
                job.told_at = now
                yield Progress(request_id, news)

    def _admit(self) -> Iterator[Outcome]:
        if not self._waiting:
            return
        for job in self._admissible():
            try:
                job.pooled = None if job.sample.adapter is None else self._adapters.hold(job.sample.adapter)
            except PoolFull:
                # Until one of the jobs that hold the other adapters is over.
                assert self._running, "an adapter that fits the pool was refused by an unused one"
                self._pool_is_full = True
                return
            except Exception as error:
                if ends_rank(error):
                    raise
                self._waiting.remove(job)  # or the next step would meet it again, whatever it is
                yield refusal(job.sample, error)
                continue
            self._waiting.remove(job)
            self._start(job)

    def _admissible(self) -> list[Job]:
        """While an adapter waits for a place, others wait behind it, or it would starve; who needs none goes
        on."""
        waiting = [job for job in self._waiting if not self._pool_is_full or job.sample.adapter is None]
        return self._turns.admissible(waiting, self._running.values(), self._config.max_batch)

    def _start(self, job: Job) -> None:
        self._running[job.sample.request_id] = job
        job.scores = PromptScores.of(job.request)  # not before: many may wait
        job.sequences.append(self._sequence(job, 0))
        self._prefilling.append(job.sequences[0])

    def _sequence(self, job: Job, index: int) -> Sequence:
        stop = StopRule(job.request.params, self._text.decode)
        return Sequence(job, index, job.request.prompt.tolist(), stop, UniformStream(job.seed, index))

    def _plan_prefill(self) -> list[tuple[Sequence, int]]:
        """(sequence, number of tokens) to prefill now, in turn, as far as budget and cache go."""
        budget = self._config.prefill_chunk_tokens
        chunks: list[tuple[Sequence, int]] = []
        in_turn = self._turns.in_turn(self._prefilling)
        rows = rows_of(self._decoding) if in_turn else Counter()
        for sequence in in_turn:
            if sequence.num_generated and self._is_crowded(sequence, rows):
                continue
            if not sequence.rows.blocks:
                self._reuse(sequence)
            count = min(budget, sequence.num_uncached)
            if count == 0 or not self._grow(sequence, count, is_first=not chunks):
                break
            chunks.append((sequence, count))
            rows[sequence.tenant] += 1
            budget -= count
            if self._isolated:
                break
        if not chunks and in_turn and not self._decoding:
            self._give_up(in_turn[0])
        return chunks

    def _grow(self, sequence: Sequence, count: int, is_first: bool) -> bool:
        """Room for ``count`` more tokens of a prompt, if need be that of another tenant's youngest."""
        while True:
            try:
                self._cache.grow(sequence.rows, sequence.rows.length + count)
                return True
            except OutOfBlocks:
                # In deterministic mode nothing is paused for company: reading again may round differently.
                may_push = is_first and not self._isolated
                other = in_the_way_of(sequence, self._decoding) if may_push else None
                if other is None:
                    return False
                self._pause(other)

    def _is_crowded(self, sequence: Sequence, rows: Counter[str]) -> bool:
        return not self._isolated and is_crowded(sequence.tenant, rows, self._config.max_batch)

    def _reuse(self, sequence: Sequence) -> None:
        """Begin with what is still cached of the same beginning. Off in deterministic mode: what is cached
        depends on who came before."""
        job = sequence.job
        if self._isolated:
            return
        fresh = sequence.num_generated == 0
        limit = job.reusable_tokens if fresh else len(sequence.tokens) - 1
        sequence.rows = reuse(self._cache, job.owner, sequence.tokens, limit)
        if fresh:
            job.num_cached_tokens = sequence.rows.length

    def _release(self, sequence: Sequence) -> None:
        remember(self._cache, sequence.job.owner, sequence.tokens, sequence.rows)
        self._cache.release(sequence.rows)

    def _give_up(self, blocked: Sequence) -> None:
        """Nothing runs that could free blocks for ``blocked``: take them from younger half-filled prompts."""
        others = [
            sequence for sequence in self._prefilling if sequence is not blocked and sequence.rows.blocks
        ]
        if others:
            self._cache.release(others[-1].rows)
        else:
            raise AssertionError("what fits the cache was refused by an empty cache")

    def _prefill(self, chunks: list[tuple[Sequence, int]]) -> None:
        chunks = sorted(chunks, key=lambda chunk: chunk[0].job.place)
        spans = [(sequence, sequence.rows.length, count) for sequence, count in chunks]
        tokens = [t for s, start, n in spans for t in s.tokens[start : start + n]]
        positions = [p for _, start, n in spans for p in range(start, start + n)]
        attend = PrefillAttend(self._cache, [(s.rows, start, n) for s, start, n in spans])
        hidden = self._pass.hidden_states(tokens, positions, attend, [(s.job.pooled, n) for s, _, n in spans])
        ends, end = [], 0
        for sequence, start, count in spans:
            score_prompt(self._base, sequence.job, start, hidden[end : end + count])
            sequence.rows.length = start + count
            end += count
            if sequence.num_uncached == 0:
                self._prefilling.remove(sequence)
                if sequence.num_generated == 0:  # only now: whoever fills a prompt stays first until it is
                    self._turns.served(sequence.tenant, len(sequence.tokens))
                remember(self._cache, sequence.job.owner, sequence.tokens, sequence.rows)
                ends.append((sequence, end - 1))
        if ends:
            rows = torch.tensor([row for _, row in ends], device=hidden.device)
            self._continue([sequence for sequence, _ in ends], hidden.index_select(0, rows))

    def _continue(self, sequences: list[Sequence], hidden: torch.Tensor) -> None:
        """Draw the next token after a completed prefill; a fresh prompt starts all its samples here."""
        logits = self._pass.logits(hidden, [(sequence.job.pooled, 1) for sequence in sequences])
        drawers: list[Sequence] = []
        rows: list[int] = []
        for row, sequence in enumerate(sequences):
            family = [sequence]
            if sequence.index == 0 and sequence.num_generated == 0:
                family += [
                    self._sequence(sequence.job, i) for i in range(1, sequence.job.request.num_samples)
                ]
                sequence.job.sequences = family
            drawers += family
            rows += [row] * len(family)
        if len(drawers) > len(sequences):
            logits = logits.index_select(0, torch.tensor(rows, device=logits.device))
        self._draw(drawers, logits)
        for sequence in drawers:
            self._start_decoding(sequence)

    def _start_decoding(self, sequence: Sequence) -> None:
        if sequence.stop_reason is not None:
            return
        if not sequence.rows.blocks:
            is_full = len(self._decoding) >= self._config.max_batch
            if is_full and self._is_crowded(sequence, rows_of(self._decoding)):
                self._prefilling.append(sequence)
                return
            try:
                sequence.rows = self._cache.fork(sequence.job.sequences[0].rows)
            except OutOfBlocks:
                self._prefilling.append(sequence)
                return
        self._decoding.append(sequence)

    def _make_room(self) -> bool:
        """Room for one more token of every running sequence, if need be by pausing the youngest ones."""
        for sequence in list(self._decoding):
            if sequence.rows.length < len(sequence.rows.blocks) * BLOCK_TOKENS:
                continue
            while sequence in self._decoding:
                try:
                    self._cache.grow(sequence.rows, sequence.rows.length + 1)
                    break
                except OutOfBlocks:
                    self._pause(youngest_of_most(self._decoding))
        return bool(self._decoding)

    def _pause(self, sequence: Sequence) -> None:
        self._decoding.remove(sequence)
        self._release(sequence)
        self._prefilling.appendleft(sequence)

    def _decode(self) -> None:
        batch = sorted(self._decoding, key=lambda sequence: sequence.job.place)
        for part in [[sequence] for sequence in batch] if self._isolated else [batch]:
            self._decode_together(part)
        if self._ended:
            self._decoding = [sequence for sequence in self._decoding if sequence.stop_reason is None]

    def _decode_together(self, batch: list[Sequence]) -> None:
        stretches = [(sequence.job.pooled, 1) for sequence in batch]
        hidden = self._pass.hidden_states(
            [sequence.tokens[-1] for sequence in batch],
            [sequence.rows.length for sequence in batch],
            DecodeAttend(self._cache, [sequence.rows for sequence in batch]),
            stretches,
        )
        for sequence in batch:
            sequence.rows.length += 1
            self._turns.served(sequence.tenant, 1)
        self._draw(batch, self._pass.logits(hidden, stretches))

    def _draw(self, sequences: list[Sequence], logits: torch.Tensor) -> None:
        """Append a drawn token to each sequence from its row of ``logits`` [B, V]."""
        params = [sequence.next_draw() for sequence in sequences]
        k = max(sequence.topk for sequence in sequences)
        drawn = draw_tokens(logits, params, k)
        tokens, logprobs = drawn.tokens.tolist(), drawn.logprobs.tolist()
        for row, sequence in enumerate(sequences):
            sequence.append(tokens[row], logprobs[row])
            if sequence.stop_reason is not None:
                self._ended.append(sequence)
        if drawn.topk is not None:
            for row, sequence in enumerate(sequences):
                if sequence.topk:
                    # Copies: a view would keep the whole array, as wide as the largest k of the batch.
                    sequence.topk_ids.append(drawn.topk.token_ids[row, : sequence.topk].copy())
                    sequence.topk_logprobs.append(drawn.topk.logprobs[row, : sequence.topk].copy())

    def _finished(self) -> Iterator[Outcome]:
        ended, self._ended = self._ended, []
        for sequence in ended:
            # At once: a job's last sample may need the room of those that ended before it.
            self._release(sequence)
        for job in {id(sequence.job): sequence.job for sequence in ended}.values():
            if job.done and self._running.pop(job.sample.request_id, None) is not None:
                self._let_go(job)
                yield _outcome(job)


def _outcome(job: Job) -> Outcome:
    logprobs = (logprob for sequence in job.sequences for logprob in sequence.logprobs)
    if all(map(math.isfinite, logprobs)):
        return Outcome(job.sample.request_id, job.result())
    advice = "these weights have diverged; sample from an earlier checkpoint"
    failure = Failure(f"the logits are not finite: {advice}")
    return Outcome(job.sample.request_id, failure=failure, metrics=job.used())


def refusal(sample: Sample, error: Exception) -> Outcome:
    """The answer to a sample that cannot begin."""
    if not isinstance(error, ValueError | KeyError | OSError | CheckpointError):
        logger.error("sample %s failed", sample.request_id, exc_info=error)
        return Outcome(sample.request_id, failure=Failure("internal error while sampling", "server"))
    logger.info("sample %s refused: %r", sample.request_id, error)
    # What else is wrong with a checkpoint names a path, which is not the user's to know.
    message = (
        str(error) if isinstance(error, ValueError) else "the weights to sample from are gone or damaged"
    )
    return Outcome(sample.request_id, failure=Failure(message))
