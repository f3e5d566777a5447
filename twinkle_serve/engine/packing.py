"""From pieces of many passes to one packed batch: token ids, positions, segments and loss rows.

Knows how datums lie end to end and which adapter owns which rows. Does not know what the model or a loss does
with them, nor why these pieces share a microbatch (control/planner.py).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from twinkle_serve.engine.layout import Group
from twinkle_serve.engine.slots import Adapter, Segment, trained_groups
from twinkle_serve.protocol.data import DatumBatch

_GROUPS: tuple[Group, ...] = ("attn", "mlp", "unembed")


def make_segments(stretches: Iterable[tuple[Adapter | None, int]]) -> dict[Group, list[Segment]]:
    """Segments per group from consecutive (adapter, number of rows); neighbours of one adapter are joined.

    Rows of adapter None, or of an adapter that does not train a group, belong to no segment of that group.
    """
    by_group: dict[Group, list[Segment]] = {group: [] for group in _GROUPS}
    position = 0
    for adapter, rows in stretches:
        end = position + rows
        if adapter is not None:
            for group in trained_groups(adapter.spec):
                segments = by_group[group]
                if segments and segments[-1].adapter is adapter and segments[-1].end == position:
                    segments[-1] = Segment(adapter, segments[-1].start, end)
                else:
                    segments.append(Segment(adapter, position, end))
        position = end
    return by_group


@dataclass(frozen=True, slots=True)
class PackedRows:
    """Sequences end to end. token_ids, position_ids: int64 [T]; lengths: tokens of each sequence."""

    token_ids: torch.Tensor
    position_ids: torch.Tensor
    lengths: list[int]

    @classmethod
    def of(
        cls, tokens: npt.NDArray[np.int32], lengths: npt.NDArray[np.int64], device: torch.device
    ) -> PackedRows:
        starts = np.repeat(np.cumsum(lengths) - lengths, lengths)
        positions = np.arange(tokens.size) - starts
        return cls(
            torch.from_numpy(tokens.astype(np.int64)).to(device),
            torch.from_numpy(positions).to(device),
            lengths.tolist(),
        )


@dataclass(frozen=True, slots=True)
class LossRows:
    """The target elements of some datums, in order.

    rows: int64 [M], the packed row each element is predicted at (an element per position, or K for [N, K]
    targets). targets: int64 [M]. inputs: the other loss inputs, float32 [M] each. lengths: elements of each
    datum.
    """

    rows: npt.NDArray[np.int64]
    targets: npt.NDArray[np.int64]
    inputs: dict[str, npt.NDArray[np.float32]]
    lengths: npt.NDArray[np.int64]

    @classmethod
    def of(cls, batch: DatumBatch, first_row: int) -> LossRows:
        column = batch.columns["target_tokens"]
        per_position = np.maximum(1, column.widths).astype(np.int64)
        positions = np.arange(first_row, first_row + batch.num_tokens)
        # np.array copies: torch refuses to wrap the read-only views that DatumBatch.unpack gives.
        return cls(
            rows=np.repeat(positions, np.repeat(per_position, batch.lengths)),
            targets=np.array(column.values, np.int64),
            inputs={
                name: np.array(other.values, np.float32)
                for name, other in batch.columns.items()
                if name != "target_tokens"
            },
            lengths=batch.lengths * per_position,
        )


def concatenate(batches: Sequence[DatumBatch]) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int64]]:
    """Tokens and lengths of several batches end to end."""
    return np.concatenate([b.tokens for b in batches]), np.concatenate([b.lengths for b in batches])
