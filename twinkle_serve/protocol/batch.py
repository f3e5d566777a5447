"""From the tensors of a request to one checked DatumBatch.

Knows lengths, ranges, finiteness and which columns a loss reads; every error names the field and the
limit. Does not know bytes or JSON (tensors.py), nor formulas.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from twinkle_serve.protocol.data import Column, DatumBatch
from twinkle_serve.protocol.errors import UserError
from twinkle_serve.protocol.losses import TARGETS, LossSpec
from twinkle_serve.protocol.tensors import Array, WireTensor

MAX_WIDTH = 4096
"""K of a tensor [N, K]: four times as many as alternatives to a token can be asked for."""
_ALWAYS_ROOM, _ROOM_PER_BYTE = 2**20, 16


@dataclass(frozen=True, slots=True)
class DatumLimits:
    """vocab_size: token ids are below it. max_length: tokens a datum. max_datums: a request.
    max_elements: numbers in one column of a request once it is dense."""

    vocab_size: int
    max_length: int
    max_datums: int = 65_536
    max_elements: int = 2**25

    @property
    def max_width(self) -> int:
        return min(MAX_WIDTH, self.vocab_size)


def dense_room(num_bytes: int) -> int:
    """max_elements for a body of so many bytes: a small one shall not fill a server's memory. A row of sparse
    targets has 12 bytes, token included, and each number in it 16. So rows of up to 192 columns always fit,
    and those of 1,024 when one of three hundred lists all of them."""
    return _ALWAYS_ROOM + _ROOM_PER_BYTE * num_bytes


class DatumSource(Protocol):
    """The datums of one request, whatever their encoding. Methods raise UserError."""

    def __len__(self) -> int: ...
    def tokens(self, index: int, max_chunks: int) -> Array:
        """model_input of a datum: int32 or int64 [N]."""
        ...

    def tensor(self, index: int, name: str) -> WireTensor | None:
        """A loss input of a datum, or None when it has none of that name."""
        ...


def assemble(
    source: DatumSource, loss: LossSpec, config: dict[str, float], limits: DatumLimits
) -> DatumBatch:
    """The batch ``loss`` can run on. Columns it does not read are dropped; optional ones that some datums
    lack are filled. Raises UserError naming the datum and the field."""
    check_count(len(source), limits)
    tokens, lengths = read_tokens(source, limits)
    columns: dict[str, Column] = {}
    for name in loss.columns:
        fill = 1.0 if name == loss.ones else config.get(name)
        column = _read_column(source, loss, name, lengths, columns.get(TARGETS), fill, limits)
        if column is not None:
            columns[name] = column
    return DatumBatch(tokens, lengths, columns)


def check_count(num_datums: int, limits: DatumLimits) -> None:
    """Raises UserError."""
    if num_datums == 0:
        raise UserError("data is empty; at least one datum is needed")
    if num_datums > limits.max_datums:
        raise UserError(f"data has {num_datums} datums; at most {limits.max_datums} fit one request")


def check_width(tensor: WireTensor, limits: DatumLimits) -> None:
    """Raises UserError."""
    if len(tensor.shape) == 2 and tensor.shape[1] > limits.max_width:
        raise UserError(f"is [N, {tensor.shape[1]}]; [N, K] is possible with K up to {limits.max_width}")


def check_token_range(tokens: Array, vocab_size: int) -> int | None:
    """The position of the first id that is not in 0..vocab_size-1, or None."""
    if tokens.size == 0 or (int(tokens.min()) >= 0 and int(tokens.max()) < vocab_size):
        return None
    return int(np.argmax((tokens < 0) | (tokens >= vocab_size)))


def read_tokens(
    source: DatumSource, limits: DatumLimits
) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int64]]:
    """The tokens of all datums end to end, and how many each has. Raises UserError."""
    parts = []
    for index in range(len(source)):
        try:
            parts.append(source.tokens(index, limits.max_length))
        except UserError as error:
            raise UserError(f"data[{index}].model_input {error}") from None
    lengths = np.array([part.size for part in parts], np.int64)
    if lengths.min() == 0:
        raise UserError(f"data[{int(np.argmin(lengths))}].model_input is empty; at least one token is needed")
    if lengths.max() > limits.max_length:
        index = int(np.argmax(lengths > limits.max_length))
        raise UserError(
            f"data[{index}].model_input has {lengths[index]} tokens; at most {limits.max_length} are possible"
        )
    tokens = np.concatenate(parts)
    wrong = check_token_range(tokens, limits.vocab_size)
    if wrong is not None:
        index, position = _locate(wrong, lengths)
        raise UserError(
            f"data[{index}].model_input token {position} is {tokens[wrong]}, "
            f"outside the vocabulary 0..{limits.vocab_size - 1}"
        )
    return tokens.astype(np.int32, copy=False), lengths


def _read_column(
    source: DatumSource,
    loss: LossSpec,
    name: str,
    lengths: npt.NDArray[np.int64],
    targets: Column | None,
    fill: float | None,
    limits: DatumLimits,
) -> Column | None:
    """One column over all datums; None when it is optional, nobody sent it and 1 is not its default."""
    parts: list[Array | None] = []
    widths = np.zeros(len(lengths), np.int32)
    room = limits.max_elements
    for index in range(len(lengths)):
        try:
            tensor = source.tensor(index, name)
            if tensor is None:
                parts.append(None)
                continue
            check_width(tensor, limits)
            values, widths[index] = tensor.as_rows(int(lengths[index]), room)
            room -= values.size
            parts.append(_as_dtype(values, name))
            if not loss.many_targets and widths[index]:
                raise UserError(f"is [N, {widths[index]}], but {loss.name} takes [N]")
            if targets is not None and widths[index] != targets.widths[index]:
                raise UserError(
                    f"is {_shape(widths[index])}, but {TARGETS} is {_shape(targets.widths[index])}"
                )
        except UserError as error:
            raise UserError(f"data[{index}].loss_fn_inputs.{name} {error}") from None
    filled = _fill_missing(parts, loss, name, lengths, widths, targets, fill)
    if filled is None:
        return None
    column = Column(np.concatenate(filled), widths)
    check_values(column, name, lengths, limits)
    return column


def _fill_missing(
    parts: list[Array | None],
    loss: LossSpec,
    name: str,
    lengths: npt.NDArray[np.int64],
    widths: npt.NDArray[np.int32],
    targets: Column | None,
    fill: float | None,
) -> list[Array] | None:
    missing = [index for index, part in enumerate(parts) if part is None]
    if missing and name in loss.inputs:
        raise UserError(
            f"data[{missing[0]}].loss_fn_inputs.{name} is missing; {loss.name} needs {', '.join(loss.inputs)}"
        )
    if len(missing) == len(parts) and name != loss.ones:
        return None
    if missing and fill is None:
        present = next(index for index, part in enumerate(parts) if part is not None)
        raise UserError(
            f"data[{missing[0]}].loss_fn_inputs.{name} is missing, but data[{present}] has it: all or none"
        )
    for index in missing:
        assert targets is not None
        widths[index] = targets.widths[index]
        parts[index] = np.full(int(lengths[index]) * max(1, int(widths[index])), fill, np.float32)
    return [part for part in parts if part is not None]


def _as_dtype(values: Array, name: str) -> Array:
    if name == TARGETS:
        if values.dtype.kind != "i":
            raise UserError("must be int64")
        return values.astype(np.int64, copy=False)
    return values.astype(np.float32, copy=False)


def check_values(column: Column, name: str, lengths: npt.NDArray[np.int64], limits: DatumLimits) -> None:
    """Target tokens in the vocabulary, everything else finite. Raises UserError naming what is not."""
    sizes = lengths * np.maximum(1, column.widths)
    if name == TARGETS:
        wrong = check_token_range(column.values, limits.vocab_size)
        rule = f"outside the vocabulary 0..{limits.vocab_size - 1}"
    else:
        finite = np.isfinite(column.values)
        wrong = None if finite.all() else int(np.argmin(finite))
        rule = "not a finite float32"
    if wrong is not None:
        index, position = _locate(wrong, sizes)
        raise UserError(f"data[{index}].loss_fn_inputs.{name}[{position}] is {column.values[wrong]}, {rule}")


def _locate(flat: int, sizes: Sequence[int] | npt.NDArray[np.int64]) -> tuple[int, int]:
    """The datum that a flat position lies in, and the position inside it."""
    ends = np.cumsum(sizes)
    index = int(np.searchsorted(ends, flat, side="right"))
    return index, flat - int(ends[index] - sizes[index])


def _shape(width: int) -> str:
    return f"[N, {width}]" if width else "[N]"
