"""Expert parallelism: each rank holds some of every layer's experts, and tokens come to them.

Before the experts every rank gathers all ranks' rows, computes what its own experts add to them, and the sums
go back to where the rows came from. Row counts are padded to the largest, so shapes depend on the plan alone.
Knows rows, routing and collectives; does not know what experts compute (experts.py) or whose rows these are.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable

from twinkle_serve.engine.experts import local_experts
from twinkle_serve.engine.layers import Segments
from twinkle_serve.engine.packing import make_segments
from twinkle_serve.engine.sharding.ranks import Ranks
from twinkle_serve.engine.sharding.strategy import Stretches
from twinkle_serve.engine.slots import Adapter

Phase = Literal["forward", "backward"]

_NOBODY = -1


class PassCollectives:
    """The collectives of a pass, which are the same for every pass but for the number of rows.

    So a rank that fails in the middle can make the rest of them with nothing in them: its peers, who cannot
    know yet, come to the end of the pass and hear of it there.
    """

    def __init__(self, ranks: Ranks, device: torch.device) -> None:
        self._ranks = ranks
        self._device = device
        self._known: dict[Phase, list[tuple[bool, int, torch.dtype]]] = {"forward": [], "backward": []}
        self._learning = True
        self._phase: Phase = "forward"
        self._done = 0
        self._num_rows = 1

    def begin(self, phase: Phase, num_rows: int | None = None) -> None:
        """num_rows: of each rank, from now on."""
        self._phase, self._done = phase, 0
        self._num_rows = num_rows or self._num_rows

    def keep(self) -> None:
        """A whole pass was made since the start; later ones are like it."""
        self._learning = False

    def complete(self) -> None:
        for gathers, width, dtype in self._known[self._phase][self._done :]:
            num_rows = self._num_rows if gathers else self._num_rows * self._ranks.size
            blank = torch.zeros(num_rows, width, dtype=dtype, device=self._device)
            self.gather(blank) if gathers else self.reduce(blank)

    def gather(self, rows: torch.Tensor) -> torch.Tensor:
        """[rows, W] of each rank, end to end."""
        self._check(True, rows)
        received = self._ranks.gather_rows(rows)
        self._done += 1
        return received

    def reduce(self, rows: torch.Tensor) -> torch.Tensor:
        """Each rank's part [rows, W] of the sum of [ranks * rows, W]."""
        self._check(False, rows)
        received = self._ranks.reduce_rows(rows)
        self._done += 1
        return received

    def _check(self, gathers: bool, rows: torch.Tensor) -> None:
        """Not counted as made before it is: memory for it may be missing, and then ``complete`` makes it."""
        known = self._known[self._phase]
        entry = (gathers, rows.shape[1], rows.dtype)
        if self._learning and self._done == len(known):
            known.append(entry)
        assert known[self._done] == entry, "passes make different collectives"


class ExpertDispatch:
    """Takes the place of the experts in the model. One instance serves all layers.

    segments: the rows that come to the experts, of all ranks end to end.
    """

    def __init__(self, ranks: Ranks, device: torch.device) -> None:
        self.ranks = ranks
        self.segments = Segments()
        self.collectives = PassCollectives(ranks, device)
        self.num_rows = 1

    def enter(self, by_rank: Sequence[Stretches]) -> None:
        """Say what rows each rank has in the pass that begins."""
        counts = [sum(rows for _, rows in stretches) for stretches in by_rank]
        self.num_rows = max(1, *counts)
        padded: list[tuple[Adapter | None, int]] = []
        for stretches, count in zip(by_rank, counts, strict=True):
            padded += [*stretches, (None, self.num_rows - count)]
        self.segments.set(make_segments(padded))
        self.collectives.begin("forward", self.num_rows)

    def enter_backward(self) -> None:
        self.collectives.begin("backward")

    def rehearsed(self) -> None:
        self.collectives.keep()

    def complete(self) -> None:
        self.collectives.complete()

    def __call__(
        self, module: nn.Module, hidden: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """As experts.experts_forward, on this rank's rows [T, H]."""
        rows, weights, index = _Gather.apply(hidden, top_k_weights, top_k_index, self)
        out = local_experts(module, rows, local_index(index, self.ranks.rank, module), weights, partial=True)
        result: torch.Tensor = _Sum.apply(out, hidden.shape[0], self)
        return result

    def padded(self, rows: torch.Tensor, value: float = 0) -> torch.Tensor:
        missing = self.num_rows - rows.shape[0]
        return F.pad(rows, (0, 0, 0, missing), value=value) if missing else rows


class _Gather(torch.autograd.Function):
    """Hidden states [T, H], routing weights and indices [T, K] of this rank -> those of all ranks."""

    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, weights: torch.Tensor, index: torch.Tensor, dispatch: ExpertDispatch
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        ctx.dispatch, ctx.num_rows = dispatch, hidden.shape[0]
        parts = [
            dispatch.padded(hidden),
            dispatch.padded(weights),
            dispatch.padded(index.to(torch.int32), _NOBODY),
        ]
        # As bytes, in one message: three would take three times as long for the few rows of a decode step.
        packed = torch.cat([part.contiguous().view(torch.uint8) for part in parts], dim=1)
        received = dispatch.collectives.gather(packed).split([p.shape[1] * p.itemsize for p in parts], dim=1)
        rows, all_weights, all_index = (
            part.contiguous().view(like.dtype) for part, like in zip(received, parts, strict=True)
        )
        ctx.mark_non_differentiable(all_index)
        return rows, all_weights, all_index

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, drows: torch.Tensor, dweights: torch.Tensor, _: Any) -> tuple[Any, ...]:
        width = drows.shape[1]
        if dweights.dtype == drows.dtype:
            both = ctx.dispatch.collectives.reduce(torch.cat((drows, dweights), dim=1))[: ctx.num_rows]
            return both[:, :width], both[:, width:], None, None
        dhidden = ctx.dispatch.collectives.reduce(drows)[: ctx.num_rows]
        return dhidden, ctx.dispatch.collectives.reduce(dweights)[: ctx.num_rows], None, None


class _Sum(torch.autograd.Function):
    """What this rank's experts add to all rows -> what all experts add to this rank's rows."""

    @staticmethod
    def forward(ctx: Any, out: torch.Tensor, num_rows: int, dispatch: ExpertDispatch) -> torch.Tensor:
        ctx.dispatch = dispatch
        return dispatch.collectives.reduce(out)[:num_rows]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: torch.Tensor) -> tuple[Any, ...]:
        return ctx.dispatch.collectives.gather(ctx.dispatch.padded(dout)), None, None


def local_index(index: torch.Tensor, rank: int, module: nn.Module) -> torch.Tensor:
    """Indices of a layer's experts as those of the ones in ``module``; their number where it is elsewhere."""
    num_experts: int = module.num_experts  # type: ignore[assignment]
    local = index.long() - rank * num_experts
    return torch.where((local >= 0) & (local < num_experts), local, num_experts)
