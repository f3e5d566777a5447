"""From the tensors of a request to the batch that an uploaded loss runs on.

Knows the ranks that the loss declared. Does not know its operations; ranges, lengths and encodings are those
of every request (batch.py, tensors.py).
"""

from __future__ import annotations

import numpy as np

from twinkle_serve.protocol.batch import (
    DatumLimits,
    DatumSource,
    check_count,
    check_values,
    check_width,
    read_tokens,
)
from twinkle_serve.protocol.data import Column, DatumBatch
from twinkle_serve.protocol.errors import UserError
from twinkle_serve.protocol.loss_graph import MAX_NODE_RUNS, LossGraph
from twinkle_serve.protocol.losses import TARGETS
from twinkle_serve.protocol.tensors import Array, WireTensor

_SHAPES = ("a scalar", "[N]", "[N, K]")


def assemble_for_graph(source: DatumSource, graph: LossGraph, limits: DatumLimits) -> DatumBatch:
    """Tokens, and a column for each input: float32 or int64 as it was sent. The logprobs' column is that of
    the target tokens; a scalar is repeated for every position. Raises UserError naming datum and field."""
    check_count(len(source), limits)
    if len(source) * len(graph.nodes) > MAX_NODE_RUNS:
        raise UserError(
            f"data has {len(source)} datums and the loss {len(graph.nodes)} nodes; their product may be at "
            f"most {MAX_NODE_RUNS}: send fewer datums a request"
        )
    tokens, lengths = read_tokens(source, limits)
    ranks = {TARGETS if name == "logprobs" else name: rank for name, rank in graph.inputs}
    if ranks[TARGETS] != graph.inputs[0][1]:
        raise UserError(f"the loss takes {TARGETS} with another rank than logprobs, whose shape it has")
    columns: dict[str, Column] = {}
    for name, rank in ranks.items():
        parts, widths, room = [], np.zeros(len(lengths), np.int32), limits.max_elements
        for index, length in enumerate(lengths.tolist()):
            try:
                tensor = source.tensor(index, name)
                if tensor is None:
                    raise UserError("is missing; the loss reads it")
                check_width(tensor, limits)
                values, widths[index] = _rows(tensor, name, rank, length, room)
            except UserError as error:
                raise UserError(f"data[{index}].loss_fn_inputs.{name} {error}") from None
            room -= values.size
            parts.append(values)
        dtype = np.int64 if all(part.dtype.kind == "i" for part in parts) else np.float32
        columns[name] = Column(np.concatenate(parts).astype(dtype, copy=False), widths)
        check_values(columns[name], name, lengths, limits)
    return DatumBatch(tokens, lengths, columns)


def _rows(tensor: WireTensor, name: str, rank: int, length: int, max_elements: int) -> tuple[Array, int]:
    """A datum's values, flat, and their width."""
    # Without a shape it is a vector, or, with a single value, as good as a scalar.
    fits = len(tensor.shape) == rank or (not tensor.shape and rank == 1)
    if not fits:
        raise UserError(f"has shape {list(tensor.shape)}, but the loss takes {_SHAPES[rank]}")
    if rank == 0:
        if tensor.values.size != 1 or tensor.crow is not None:
            raise UserError(f"has {tensor.values.size} values, but the loss takes {_SHAPES[rank]}")
        return np.repeat(_as_dtype(tensor.values, name), length), 0
    values, width = tensor.as_rows(length, max_elements)
    return _as_dtype(values, name), width


def _as_dtype(values: Array, name: str) -> Array:
    if values.dtype.kind == "i":
        return values.astype(np.int64, copy=False)
    if name == TARGETS:
        raise UserError("must be int64")
    return values.astype(np.float32, copy=False)
