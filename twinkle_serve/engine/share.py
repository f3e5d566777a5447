"""One rank's share of a microbatch: its datums end to end, their logprobs and losses, and the way back.

Knows datums, losses and the base model. Does not know slots' bookkeeping, other ranks' shares or what becomes
of a request that fails (trainer.py).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
import numpy.typing as npt
import torch

from twinkle_serve.engine.attention import PackedCausal
from twinkle_serve.engine.base_model import BaseModel
from twinkle_serve.engine.graph_loss import datum_tensors, graph_loss
from twinkle_serve.engine.losses import Loss, compute_loss
from twinkle_serve.engine.packing import LossRows, PackedRows, concatenate
from twinkle_serve.engine.slots import Segment
from twinkle_serve.protocol.data import DatumBatch
from twinkle_serve.protocol.errors import UserError
from twinkle_serve.protocol.loss_graph import GRAPH, read_graph
from twinkle_serve.protocol.work import Failure, Pass, Piece

LARGEST_GRADIENT = 1e18
"""Of a loss by one logprob. Adam squares gradients: beyond this float32 overflows, now or later."""


@dataclass(slots=True)
class Report:
    """What a rank computed of a microbatch, by pass: that it failed, or logprobs by datum and sums of
    metrics."""

    failures: dict[int, Failure] = field(default_factory=dict)
    logprobs: dict[int, dict[int, npt.NDArray[np.float32]]] = field(default_factory=dict)
    metrics: dict[int, dict[str, float]] = field(default_factory=dict)

    def note(
        self, piece: Piece, part: LossRows, logprobs: torch.Tensor, metrics: Mapping[str, torch.Tensor]
    ) -> None:
        ends = np.cumsum(part.lengths)
        rows = np.split(logprobs.cpu().numpy(), ends[:-1])
        self.logprobs[piece.pass_index] = dict(zip(piece.indices, rows, strict=True))
        self.metrics[piece.pass_index] = {name: float(value) for name, value in metrics.items()}


@dataclass(slots=True)
class _Item:
    """Some datums of one pass; ``span``: their elements among all of the share."""

    piece: Piece
    request: Pass
    batch: DatumBatch
    rows: LossRows
    span: slice


class Share:
    """To be gone through once: ``forward``, ``drop`` what failed anywhere, ``backward``.

    Without any datum it still makes the same pass as the other ranks, with a row of its own.
    """

    def __init__(
        self,
        base: BaseModel,
        pieces: Sequence[tuple[Piece, Pass, DatumBatch]],
        head: Sequence[Segment],
        wants_grad: bool,
    ) -> None:
        """pieces: each with its request and all of that's datums. head: the segments of group "unembed"."""
        self._base = base
        self._pieces = pieces
        self._items: list[_Item] = []
        self._head = head
        self._wants_grad = wants_grad
        self._hidden = self._logprobs = self._gradient = torch.empty(0)

    def forward(self) -> Report:
        self._items = _lay_out(self._pieces)  # here, where an error on one rank is one of all
        packed = self._packed()
        with torch.set_grad_enabled(self._wants_grad):
            self._hidden = self._base.hidden_states(
                packed.token_ids, packed.position_ids, PackedCausal(packed.lengths)
            )
            if self._items:
                self._logprobs = self._base.target_logprobs(
                    self._hidden,
                    self._head,
                    torch.from_numpy(np.concatenate([item.rows.rows for item in self._items])),
                    torch.from_numpy(np.concatenate([item.rows.targets for item in self._items])),
                )
        return self._losses(self._logprobs.detach())

    def drop(self, pass_index: int) -> None:
        """The pass failed: its rows get no gradient."""
        for item in self._items:
            if item.piece.pass_index == pass_index:
                self._gradient[item.span] = 0

    def backward(self) -> None:
        if self._items:
            torch.autograd.backward(self._logprobs, self._gradient)
        else:
            self._hidden.backward(torch.zeros_like(self._hidden))

    def _packed(self) -> PackedRows:
        if not self._items:
            return PackedRows.of(np.zeros(1, np.int32), np.ones(1, np.int64), self._base.device)
        return PackedRows.of(*concatenate([item.batch for item in self._items]), self._base.device)

    def _losses(self, logprobs: torch.Tensor) -> Report:
        """Every pass's logprobs and metrics; keeps d(sum of losses)/d(logprobs), [M].

        A pass whose numbers are not finite, or would not stay so, fails here, and its rows get no gradient,
        so its neighbours in the microbatch never see it.
        """
        report, self._gradient = Report(), torch.zeros_like(logprobs)
        for item in self._items:
            leaf = logprobs[item.span].clone().requires_grad_()
            try:
                loss = _loss(item.request, leaf, item.batch, item.rows)
            except UserError as error:
                report.failures[item.piece.pass_index] = error.as_failure()
                continue
            (gradient,) = torch.autograd.grad(loss.value, leaf)
            fine = (gradient.abs() <= LARGEST_GRADIENT).all() & torch.isfinite(leaf).all()
            if not bool(fine & torch.isfinite(loss.value)):
                report.failures[item.piece.pass_index] = _not_finite(item, leaf)
                continue
            self._gradient[item.span] = gradient
            report.note(item.piece, item.rows, leaf.detach(), loss.metrics)
        return report


def _lay_out(pieces: Sequence[tuple[Piece, Pass, DatumBatch]]) -> list[_Item]:
    batches = [_select(batch, piece.indices) for piece, _, batch in pieces]
    firsts = np.cumsum([0] + [batch.num_tokens for batch in batches]).tolist()
    rows = [LossRows.of(batch, first) for batch, first in zip(batches, firsts, strict=False)]
    ends = np.cumsum([0] + [part.targets.size for part in rows]).tolist()
    return [
        _Item(piece, request, batch, part, slice(*span))
        for (piece, request, _), batch, part, span in zip(pieces, batches, rows, pairwise(ends), strict=True)
    ]


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


def _not_finite(item: _Item, logprobs: torch.Tensor) -> Failure:
    if bool(torch.isfinite(logprobs).all()):
        what = f"the {item.request.loss_fn} loss or its gradient is not finite in float32"
        advice = "check the size of its loss_fn_inputs"
    else:
        what, advice = "the model's logprobs are not finite", "the adapter has diverged; load a checkpoint"
    datums = ", ".join(str(index) for index in item.piece.indices[:8])
    return Failure(f"{what} (among data[{datums}]); nothing of this request was accumulated; {advice}")
