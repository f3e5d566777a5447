"""forward and forward_backward of many requests: microbatch by microbatch, one run of the model each.

Each request's loss reads its own logprobs, so losses, ranks and tenants mix in a microbatch. Gradients land
in the slots. A request fails alone: whatever it had added to its run's gradients is taken back. Knows nothing
of ordering or fairness (control/planner.py) and keeps no state between ticks but the slots' gradients.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch

from twinkle_serve.engine.base_model import BaseModel
from twinkle_serve.engine.sharding.division import divide
from twinkle_serve.engine.sharding.ranks import ends_rank, is_out_of_memory
from twinkle_serve.engine.share import Report, Share
from twinkle_serve.engine.slots import Adapter, SlotPool
from twinkle_serve.faults import reach
from twinkle_serve.protocol.data import Column, DatumBatch, ForwardResult
from twinkle_serve.protocol.work import Failure, Outcome, Pass, Piece

logger = logging.getLogger(__name__)

Microbatch = Sequence[Piece]
NO_ADAPTER = Failure("internal error: the workers have no adapter of this run", "server")


@dataclass(slots=True)
class _PassState:
    """A request on its way: what has been computed of it so far."""

    request: Pass
    batch: DatumBatch
    remaining: int
    logprobs: dict[int, npt.NDArray[np.float32]] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)
    failure: Failure | None = None
    answered: bool = False

    @classmethod
    def of(cls, request: Pass) -> _PassState:
        batch = DatumBatch.unpack(request.datums)
        return cls(request, batch, batch.num_datums)

    def restart(self) -> None:
        """Forget what was computed, before the request is run again."""
        self.remaining = self.batch.num_datums
        self.metrics.clear()

    def outcome(self) -> Outcome:
        self.answered = True
        if self.failure is not None:
            return Outcome(self.request.request_id, failure=self.failure)
        values = np.concatenate([self.logprobs[index] for index in range(self.batch.num_datums)])
        widths = self.batch.columns["target_tokens"].widths
        metrics = {
            name: value / self.batch.num_datums if name.endswith(":mean") else value
            for name, value in self.metrics.items()
            if np.isfinite(value)
        }
        result = ForwardResult(Column(values, widths), self.batch.lengths, metrics)
        return Outcome(self.request.request_id, result)


class Trainer:
    """Runs the passes of a tick on a base model and its training slots."""

    def __init__(self, base: BaseModel, pool: SlotPool) -> None:
        self._base = base
        self._pool = pool

    def run(self, passes: Sequence[Pass], microbatches: Sequence[Microbatch]) -> Iterator[Outcome]:
        """Outcomes of all ``passes`` (ForwardResult), each as soon as its last datum is done."""
        states = [_PassState.of(request) for request in passes]
        for state in states:
            if not self._pool.is_occupied(state.request.slot):
                state.failure = NO_ADAPTER
        backups = self._backups(states)
        todo: Sequence[Microbatch] = [part for batch in microbatches for part in _by_direction(batch, states)]
        while todo:
            tainted, split = self._attempt(todo, states)
            yield from _finished(states, tainted)
            self._restore(tainted, backups)
            todo = _redo(todo, states, tainted, split)
        yield from _finished(states, set())
        assert all(state.answered for state in states), "a microbatch plan missed a datum"

    def _backups(self, states: Sequence[_PassState]) -> dict[int, torch.Tensor | None]:
        """Gradients before this tick, per slot that will get some; None where there are none yet."""
        slots = {state.request.slot for state in states if state.request.backward}
        return {
            slot: _copy(self._pool.blocks(slot)[1]) if self._pool.has_grads[slot] else None for slot in slots
        }

    def _restore(self, slots: set[int], backups: dict[int, torch.Tensor | None]) -> None:
        for slot in slots & backups.keys():
            self._pool.clear_grads(slot)
            backup = backups[slot]
            if backup is not None:
                self._pool.blocks(slot)[1].copy_(backup)
                self._pool.has_grads[slot] = True

    def _attempt(self, todo: Sequence[Microbatch], states: Sequence[_PassState]) -> tuple[set[int], set[int]]:
        """Run microbatches. Returns the slots whose gradients must be taken back and computed again, and the
        indices into ``todo`` of the microbatches that did not fit into memory."""
        tainted: set[int] = set()
        split: set[int] = set()
        for index, microbatch in enumerate(todo):
            pieces = [
                piece
                for piece in microbatch
                if states[piece.pass_index].failure is None
                and states[piece.pass_index].request.slot not in tainted
            ]
            if not pieces:
                continue
            involved = [states[piece.pass_index] for piece in pieces]
            try:
                self._run(pieces, involved)
            except Exception as error:
                if ends_rank(error):
                    raise  # nobody may be told that a request failed that will be done again elsewhere
                # Halving finds the one request or datum that cannot be done, and spares its neighbours.
                num_datums = sum(len(piece.indices) for piece in pieces)
                out_of_memory = is_out_of_memory(error)
                if (num_datums if out_of_memory else len(pieces)) > 1:
                    split.add(index)
                else:
                    _fail(involved, error, out_of_memory)
                tainted |= {state.request.slot for state in involved}
            # Even one that failed at once: on rows that are not finite, zero gradients turn into NaN.
            tainted |= {s.request.slot for s in involved if s.failure is not None and s.request.backward}
        return tainted, split

    def _run(self, pieces: Sequence[Piece], states: Sequence[_PassState]) -> None:
        """One microbatch; all its passes go the same direction. Each rank computes some of its datums, and
        all of them learn what became of each. Raises on all ranks if one cannot go on."""
        base = self._base
        by_index = {piece.pass_index: state for piece, state in zip(pieces, states, strict=True)}
        lengths = [
            state.batch.lengths[[*p.indices]].tolist() for p, state in zip(pieces, states, strict=True)
        ]
        by_rank = divide(pieces, lengths, base.ranks.size)
        segments = base.enter([self._stretches(share, by_index) for share in by_rank])
        backward = states[0].request.backward
        own = [
            (p, by_index[p.pass_index].request, by_index[p.pass_index].batch)
            for p in by_rank[base.ranks.rank]
        ]
        share = Share(base, own, segments["unembed"], backward)
        for report in base.sharding.all_parts(share.forward):
            _take_note(report, by_index)
        for piece, state in zip(pieces, states, strict=True):
            state.remaining -= len(piece.indices)
            if state.failure is not None:
                share.drop(piece.pass_index)
        if backward:
            for state in states:
                # Before backward: an error in the middle of it leaves gradients behind as well.
                self._pool.has_grads[state.request.slot] |= state.failure is None
            base.sharding.enter_backward()
            base.sharding.all_parts(share.backward)
            reach("after backward")
        base.sharding.leave()

    def _stretches(
        self, pieces: Sequence[Piece], states: Mapping[int, _PassState]
    ) -> list[tuple[Adapter | None, int]]:
        """Whose rows a rank has. One without any runs a row of its own: all ranks make the same passes."""
        found: list[tuple[Adapter | None, int]] = []
        for piece in pieces:
            state = states[piece.pass_index]
            rows = int(state.batch.lengths[[*piece.indices]].sum())
            found.append((self._pool.adapter(state.request.slot), rows))
        return found or [(None, 1)]


def _copy(block: torch.Tensor) -> torch.Tensor:
    """On the host if the device is full: without a copy no request could fail alone."""
    try:
        return block.clone()
    except torch.OutOfMemoryError:
        return block.to("cpu", copy=True)


def _take_note(report: Report, states: Mapping[int, _PassState]) -> None:
    for pass_index, failure in report.failures.items():
        states[pass_index].failure = states[pass_index].failure or failure
    for pass_index, logprobs in report.logprobs.items():
        states[pass_index].logprobs.update(logprobs)
    for pass_index, metrics in report.metrics.items():
        totals = states[pass_index].metrics
        for name, value in metrics.items():
            totals[name] = totals.get(name, 0.0) + value


def _by_direction(microbatch: Microbatch, states: Sequence[_PassState]) -> list[Microbatch]:
    """Passes that need gradients apart from those that do not, which then run without keeping activations."""
    backward = [piece for piece in microbatch if states[piece.pass_index].request.backward]
    forward = [piece for piece in microbatch if not states[piece.pass_index].request.backward]
    return [part for part in (backward, forward) if part]


def _redo(
    todo: Sequence[Microbatch], states: Sequence[_PassState], tainted: set[int], split: set[int]
) -> list[Microbatch]:
    """The microbatches to run again for tainted slots, halved where they did not fit into memory."""
    again: list[Microbatch] = []
    for index, microbatch in enumerate(todo):
        pieces = [
            piece
            for piece in microbatch
            if states[piece.pass_index].request.slot in tainted
            and states[piece.pass_index].failure is None
            and (states[piece.pass_index].request.backward or not states[piece.pass_index].answered)
        ]
        again += _halves(pieces) if index in split else [pieces] if pieces else []
    for pass_index in {piece.pass_index for microbatch in again for piece in microbatch}:
        states[pass_index].restart()
    return again


def _halves(pieces: Sequence[Piece]) -> list[Microbatch]:
    """Split a microbatch into two of about equally many datums."""
    datums = [(piece.pass_index, index) for piece in pieces for index in piece.indices]
    middle = (len(datums) + 1) // 2
    return [_pieces(half) for half in (datums[:middle], datums[middle:]) if half]


def _pieces(datums: Sequence[tuple[int, int]]) -> list[Piece]:
    by_pass: dict[int, list[int]] = {}
    for pass_index, index in datums:
        by_pass.setdefault(pass_index, []).append(index)
    return [Piece(pass_index, tuple(indices)) for pass_index, indices in by_pass.items()]


def _finished(states: Sequence[_PassState], tainted: set[int]) -> Iterator[Outcome]:
    for state in states:
        if state.answered:
            continue
        if state.failure is not None or (state.remaining == 0 and state.request.slot not in tainted):
            yield state.outcome()


def _fail(states: Sequence[_PassState], error: Exception, out_of_memory: bool) -> None:
    if out_of_memory:
        failure = Failure("one datum alone does not fit into the memory of this server; shorten it")
    else:
        logger.error("a microbatch failed", exc_info=error)
        failure = Failure("internal error while computing this request", "server")
    for state in states:
        state.failure = failure
