"""forward and forward_backward of many requests: microbatch by microbatch, one run of the model each.

Each request's loss reads its own logprobs, so losses, ranks and tenants mix in a microbatch. Gradients land
in the slots. A request fails alone: whatever it had added to its run's gradients is taken back. Knows nothing
of ordering or fairness (control/planner.py) and keeps no state between ticks but the slots' gradients.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch

from twinkle_serve.engine.attention import PackedCausal
from twinkle_serve.engine.base_model import BaseModel
from twinkle_serve.engine.graph_loss import datum_tensors, graph_loss
from twinkle_serve.engine.losses import Loss, compute_loss
from twinkle_serve.engine.packing import LossRows, PackedRows, concatenate, make_segments
from twinkle_serve.engine.slots import Segment, SlotPool
from twinkle_serve.faults import reach
from twinkle_serve.protocol.data import Column, DatumBatch, ForwardResult
from twinkle_serve.protocol.errors import UserError
from twinkle_serve.protocol.loss_graph import GRAPH, read_graph
from twinkle_serve.protocol.work import Failure, Outcome, Pass, Piece

logger = logging.getLogger(__name__)

Microbatch = Sequence[Piece]

LARGEST_GRADIENT = 1e18
"""Of a loss by one logprob. Adam squares gradients: beyond this float32 overflows, now or later."""


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
            slot: self._pool.blocks(slot)[1].clone() if self._pool.has_grads[slot] else None for slot in slots
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
                # Halving finds the one request or datum that cannot be done, and spares its neighbours.
                num_datums = sum(len(piece.indices) for piece in pieces)
                out_of_memory = _is_out_of_memory(error)
                if (num_datums if out_of_memory else len(pieces)) > 1:
                    split.add(index)
                else:
                    _fail(involved, error, out_of_memory)
                tainted |= {state.request.slot for state in involved}
            # Even one that failed at once: on rows that are not finite, zero gradients turn into NaN.
            tainted |= {s.request.slot for s in involved if s.failure is not None and s.request.backward}
        return tainted, split

    def _run(self, pieces: Sequence[Piece], states: Sequence[_PassState]) -> None:
        """One microbatch; all its passes go the same direction."""
        batches = [_select(state.batch, piece.indices) for state, piece in zip(states, pieces, strict=True)]
        packed = PackedRows.of(*concatenate(batches), self._base.device)
        segments = make_segments(
            (self._pool.adapter(state.request.slot), batch.num_tokens)
            for state, batch in zip(states, batches, strict=True)
        )
        firsts = np.cumsum([0] + [batch.num_tokens for batch in batches[:-1]])
        parts = [LossRows.of(batch, int(first)) for batch, first in zip(batches, firsts, strict=True)]
        backward = states[0].request.backward
        self._base.segments.set(segments)
        with torch.set_grad_enabled(backward):
            hidden = self._base.hidden_states(
                packed.token_ids, packed.position_ids, PackedCausal(packed.lengths)
            )
            logprobs = self._logprobs(hidden, segments["unembed"], parts)
        gradient = self._losses(states, pieces, batches, parts, logprobs.detach())
        if backward:
            for state in states:
                # Before backward: an error in the middle of it leaves gradients behind as well.
                self._pool.has_grads[state.request.slot] |= state.failure is None
            torch.autograd.backward(logprobs, gradient)
            reach("after backward")

    def _logprobs(
        self, hidden: torch.Tensor, segments: Sequence[Segment], parts: Sequence[LossRows]
    ) -> torch.Tensor:
        return self._base.target_logprobs(
            hidden,
            segments,
            torch.from_numpy(np.concatenate([part.rows for part in parts])),
            torch.from_numpy(np.concatenate([part.targets for part in parts])),
        )

    def _losses(
        self,
        states: Sequence[_PassState],
        pieces: Sequence[Piece],
        batches: Sequence[DatumBatch],
        parts: Sequence[LossRows],
        logprobs: torch.Tensor,
    ) -> torch.Tensor:
        """Record every pass's logprobs and metrics; returns d(sum of losses)/d(logprobs), [M].

        A pass whose numbers are not finite, or would not stay so, fails here, and its rows get no gradient,
        so its neighbours in the microbatch never see it.
        """
        gradient = torch.zeros_like(logprobs)
        end = 0
        for state, piece, batch, part in zip(states, pieces, batches, parts, strict=True):
            start, end = end, end + part.targets.size
            leaf = logprobs[start:end].clone().requires_grad_()
            try:
                loss = _loss(state.request, leaf, batch, part)
            except UserError as error:
                state.failure = error.as_failure()
                continue
            (part_gradient,) = torch.autograd.grad(loss.value, leaf)
            fine = (part_gradient.abs() <= LARGEST_GRADIENT).all() & torch.isfinite(leaf).all()
            if not bool(fine & torch.isfinite(loss.value)):
                state.failure = _not_finite(state, piece, leaf)
                continue
            gradient[start:end] = part_gradient
            _record(state, piece, part, leaf.detach(), loss.metrics)
        return gradient


def _select(batch: DatumBatch, indices: Sequence[int]) -> DatumBatch:
    return batch if len(indices) == batch.num_datums else batch.select(indices)


def _loss(request: Pass, leaf: torch.Tensor, batch: DatumBatch, part: LossRows) -> Loss:
    """Raises UserError for an uploaded loss that fails on this data."""
    text = request.loss_config.get(GRAPH)
    if isinstance(text, str):
        graph = read_graph(text)
        return graph_loss(graph, leaf, datum_tensors(graph, batch))
    inputs = {name: torch.from_numpy(values).to(leaf.device) for name, values in part.inputs.items()}
    lengths = torch.from_numpy(part.lengths)
    return compute_loss(request.loss_fn, leaf, inputs, lengths, _numbers(request))


def _numbers(request: Pass) -> dict[str, float]:
    return {name: float(value) for name, value in request.loss_config.items() if not isinstance(value, str)}


def _record(
    state: _PassState, piece: Piece, part: LossRows, logprobs: torch.Tensor, metrics: dict[str, torch.Tensor]
) -> None:
    values = logprobs.cpu().numpy()
    ends = np.cumsum(part.lengths)
    for index, rows in zip(piece.indices, np.split(values, ends[:-1]), strict=True):
        state.logprobs[index] = rows
    state.remaining -= len(piece.indices)
    for name, value in metrics.items():
        state.metrics[name] = state.metrics.get(name, 0.0) + float(value)


def _not_finite(state: _PassState, piece: Piece, logprobs: torch.Tensor) -> Failure:
    if bool(torch.isfinite(logprobs).all()):
        what = f"the {state.request.loss_fn} loss or its gradient is not finite in float32"
        advice = "check the size of its loss_fn_inputs"
    else:
        what, advice = "the model's logprobs are not finite", "the adapter has diverged; load a checkpoint"
    datums = ", ".join(str(index) for index in piece.indices[:8])
    return Failure(f"{what} (among data[{datums}]); nothing of this request was accumulated; {advice}")


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


def _is_out_of_memory(error: Exception) -> bool:
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
