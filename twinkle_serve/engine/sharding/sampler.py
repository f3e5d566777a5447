"""Sampling over a group: every request is decoded by one rank, and all ranks step together.

Each rank runs the plain sampler on its own requests, with its own part of the KV cache; what it must not do
alone is go through the model, take an adapter into the pool, or stop. In deterministic mode the first rank
has all requests, and one sequence after another goes through the model: a row always meets the same others.
Knows which rank has which request. Does not know how a rank schedules its own (engine/sampler.py).
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from twinkle_serve.engine.adapter_pool import Pooled, PoolFull
from twinkle_serve.engine.attention import PackedCausal
from twinkle_serve.engine.base_model import BaseModel
from twinkle_serve.engine.kv_cache import BLOCK_TOKENS
from twinkle_serve.engine.sample_adapters import SampleAdapters
from twinkle_serve.engine.sampler import Sampler, refusal
from twinkle_serve.engine.sequences import Sequence
from twinkle_serve.engine.sharding.ranks import ends_rank
from twinkle_serve.engine.slots import Adapter
from twinkle_serve.model_config import SamplerConfig
from twinkle_serve.protocol.work import AdapterRef, Outcome, Progress, Sample

logger = logging.getLogger(__name__)

Proposal = tuple[str, AdapterRef | None]
Rows = list[tuple[int | None, int]]
"""(an adapter's first row in the pool, or None; how many rows it has), one after the other."""


@dataclass(slots=True)
class _Member:
    """A request of the group, on every rank. pooled: its adapter, once the request is admitted."""

    owner: int
    num_sequences: int
    pooled: Pooled | None = None


@dataclass(frozen=True, slots=True)
class _News:
    """What a rank tells the others between two steps.

    prefills: it has prompts to prefill. decodes: whose rows it would decode now. over: its time is up.
    """

    items: list[Outcome | Progress]
    proposals: list[Proposal]
    prefills: bool
    decodes: Rows
    over: bool


class SharedSampler(Sampler):
    """A Sampler that is one of a group's. All ranks make the same calls; only the first yields anything."""

    def __init__(
        self, base: BaseModel, adapters: SampleAdapters, config: SamplerConfig, directory: Path
    ) -> None:
        size = base.ranks.size
        own = {
            "kv_cache_tokens": max(BLOCK_TOKENS, config.kv_cache_tokens // size),
            "max_batch": -(-config.max_batch // size),
        }
        super().__init__(base, adapters, config.model_copy(update=own), directory)
        self._ranks = base.ranks
        self._members: dict[str, _Member] = {}
        self._outbox: list[Outcome | Progress] = []

    @property
    def num_active(self) -> int:
        """Requests of the whole group, the same on all ranks."""
        return len(self._members)

    def run(
        self, cancels: SequenceOf[str], samples: SequenceOf[Sample], budget_s: float
    ) -> Iterator[Outcome | Progress]:
        for request_id in cancels:
            self._outbox += self._cancel(request_id)
            self._end_membership(request_id)
        for sample in samples:
            self._take(sample)
        if not self._members and not cancels:
            return
        deadline = time.perf_counter() + budget_s
        over = budget_s <= 0
        while True:
            news = self._ranks.everyone(self._news(over))
            self._outbox = []
            for items in [rank.items for rank in news]:
                yield from items
                for item in items:
                    if isinstance(item, Outcome):
                        self._end_membership(item.request_id)
            if not self._members or news[0].over:  # the first rank's clock counts: they all differ
                return
            for rank in news:
                for proposal in rank.proposals:
                    self._admit_member(*proposal)
            if any(rank.prefills or rank.proposals for rank in news):
                self._shared_step()
            else:  # the many steps that only decode need no further message
                self._decode_all([rank.decodes for rank in news])
            self._outbox += self._finished()
            self._outbox += self._progress()
            over = time.perf_counter() >= deadline

    def _news(self, over: bool) -> _News:
        decodes = self._places([(sequence, 1) for sequence in self._decoding]) if self._can_decode() else []
        return _News(self._outbox, self._proposals(), bool(self._prefilling), decodes, over)

    def _can_decode(self) -> bool:
        return bool(self._decoding) and self._make_room()

    # who is there ---------------------------------------------------------------------------------

    def _take(self, sample: Sample) -> None:
        """Give a new request to the rank with the fewest sequences."""
        loads = [0] * self._ranks.size
        for member in self._members.values():
            loads[member.owner] += member.num_sequences
        owner = 0 if self._isolated else loads.index(min(loads))
        self._members[sample.request_id] = _Member(owner, sample.request.num_samples)
        if owner == self._ranks.rank:
            try:
                self._enter(self._job(sample))
            except (ValueError, OSError) as error:
                self._outbox.append(refusal(sample, error))

    def _end_membership(self, request_id: str) -> None:
        member = self._members.pop(request_id, None)
        if member is None:
            return
        elsewhere = member.owner != self._ranks.rank  # the owner let go when its job ended
        if elsewhere and member.pooled is not None and self._adapters.let_go(member.pooled):
            self._pool_is_full = False

    def _proposals(self) -> list[Proposal]:
        """The waiting requests that this rank has room for, in turn."""
        return [(job.sample.request_id, job.sample.adapter) for job in self._admissible()]

    def _admit_member(self, request_id: str, ref: AdapterRef | None) -> None:
        """On every rank: rows of this request come to all of them, wherever it is decoded."""
        if self._pool_is_full and ref is not None:
            return  # see _admissible; ranks propose before they know that another's fills the pool
        member = self._members[request_id]
        error: Exception | None = None
        if ref is not None:
            try:
                member.pooled = self._adapters.hold(ref)
            except PoolFull:
                self._pool_is_full = True
                return
            except Exception as raised:
                if ends_rank(raised):
                    raise
                error = raised
        if member.owner != self._ranks.rank:
            return
        job = next(job for job in self._waiting if job.sample.request_id == request_id)
        self._waiting.remove(job)
        if error is not None:
            self._outbox.append(refusal(job.sample, error))
            return
        job.pooled = member.pooled
        self._start(job)

    # through the model together -------------------------------------------------------------------

    def _shared_step(self) -> None:
        """Prefill what there is, then decode."""
        with torch.no_grad():
            chunks = self._plan_prefill()
        self._go(self._places(chunks), lambda: self._prefill(chunks))
        self._outbox += self._finished()
        decodes = [(sequence, 1) for sequence in self._decoding] if self._can_decode() else []
        self._decode_all(self._ranks.everyone(self._places(decodes)))

    def _places(self, rows: list[tuple[Sequence, int]]) -> Rows:
        """In the order in which rows go through the model."""
        ordered = sorted(rows, key=lambda row: row[0].job.place)
        return [(s.job.pooled.first if s.job.pooled else None, count) for s, count in ordered]

    def _go(self, own: Rows, action: Callable[[], None]) -> None:
        self._go_all(self._ranks.everyone(own), action)

    def _go_all(self, by_rank: list[Rows], action: Callable[[], None]) -> None:
        """``action`` takes this rank's rows through the model once. A rank without rows goes along with one
        of its own; if no rank has any, none goes."""
        if not any(by_rank):
            return
        self._base.enter([self._stretches(places) for places in by_rank])
        try:
            with torch.no_grad():
                action() if by_rank[self._ranks.rank] else self._go_along()
        except Exception as error:
            if ends_rank(error):
                raise
            logger.exception("a sampling step failed")
            self._base.sharding.complete()
            self._outbox += self._abort()
        self._base.sharding.leave()

    def _decode_all(self, by_rank: list[Rows]) -> None:
        if not self._isolated:
            return self._go_all(by_rank, self._decode)
        nothing: list[Rows] = [[] for _ in by_rank[1:]]
        own = sorted(self._decoding, key=lambda sequence: sequence.job.place)
        for index, place in enumerate(by_rank[0]):
            self._go_all([[place], *nothing], partial(self._decode_one, own, index))
        self._decoding = [sequence for sequence in self._decoding if sequence.stop_reason is None]

    def _decode_one(self, batch: list[Sequence], index: int) -> None:
        if batch[index] in self._decoding:
            self._decode_together([batch[index]])
        else:  # given up with the one before it, but the other ranks do not know that yet
            self._go_along()

    def _go_along(self) -> None:
        zero = torch.zeros(1, dtype=torch.int64, device=self._base.device)
        self._base.hidden_states(zero, zero, PackedCausal([1]))

    def _stretches(self, places: Rows) -> list[tuple[Adapter | None, int]]:
        held = {m.pooled.first: m.pooled.adapter for m in self._members.values() if m.pooled is not None}
        return [(None if first is None else held[first], count) for first, count in places] or [(None, 1)]
