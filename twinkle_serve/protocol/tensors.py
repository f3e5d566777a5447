"""One tensor or token list of a request as a flat numpy array, from protobuf or from JSON.

Knows dense and CSR layouts and the wire's dtypes. Does not know what a tensor is for: lengths, ranges and
finiteness are batch.py's business. Errors are UserErrors without the field's name; the caller adds it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from twinkle_serve.protocol import schema
from twinkle_serve.protocol.errors import UserError
from twinkle_serve.protocol.showing import shown

Array = npt.NDArray[Any]

_DTYPES: dict[int, np.dtype[Any]] = {
    schema.FLOAT32: np.dtype("<f4"),
    schema.INT64: np.dtype("<i8"),
    schema.INT32: np.dtype("<i4"),
    schema.BFLOAT16: np.dtype("<u2"),
}
_INDEX: np.dtype[Any] = np.dtype("<i8")
_NUMBERS = {False: frozenset((int,)), True: frozenset((int, float))}


@dataclass(frozen=True, slots=True)
class WireTensor:
    """values: flat, of a float or int dtype, all entries (dense) or the listed ones (CSR).
    shape: as declared; () when the client gave none, which means 1-D. crow, col: CSR indices or None."""

    values: Array
    shape: tuple[int, ...]
    crow: Array | None = None
    col: Array | None = None

    def as_rows(self, num_rows: int, max_elements: int) -> tuple[Array, int]:
        """Flat values of ``num_rows`` rows, and their width: 0 for [N], K for [N, K].

        Entries that CSR does not list are 0. Raises UserError when the shape is another, or when
        a CSR tensor would be larger than ``max_elements``, which is what the request has room for.
        """
        shape = self.shape or (self.values.size,)
        _check_dimensions(len(shape))
        if shape[0] != num_rows:
            raise UserError(f"has length {shape[0]}, but model_input has {num_rows} tokens")
        width = shape[1] if len(shape) == 2 else 0
        if len(shape) == 2 and width < 1:
            raise UserError(f"has shape {list(shape)}; it needs at least one column")
        size = num_rows * max(1, width)
        if self.crow is not None:
            if size > max_elements:
                raise UserError(
                    f"has {size} elements when dense; at most {max_elements} fit a request of this size"
                )
            return self._densify(num_rows, width), width
        if self.values.size != size:
            raise UserError(f"has {self.values.size} values, but shape {list(shape)} needs {size}")
        return self.values, width

    def _densify(self, num_rows: int, width: int) -> Array:
        crow, col = self.crow, self.col
        assert crow is not None
        if width < 1 or col is None:
            raise UserError("is sparse, so it needs a shape [N, K] and column indices")
        # Bounds before differences: those of numbers near 2^63 wrap around, and look as if they ascended.
        within = crow.size == num_rows + 1 and crow.min() >= 0 and crow.max() <= col.size
        if not within or crow[0] != 0 or crow[-1] != col.size or np.any(np.diff(crow) < 0):
            raise UserError(f"has invalid row pointers for {num_rows} rows and {col.size} columns listed")
        if col.size != self.values.size:
            raise UserError(f"lists {col.size} column indices for {self.values.size} values")
        if col.size and (col.min() < 0 or col.max() >= width):
            raise UserError(f"has a column index outside 0..{width - 1}")
        cells = np.repeat(np.arange(num_rows) * width, np.diff(crow)) + col
        if np.any(np.diff(cells) <= 0) and np.unique(cells).size != cells.size:
            raise UserError("lists an entry twice")
        dense = np.zeros(num_rows * width, self.values.dtype)
        dense[cells] = self.values
        return dense


def tensor_from_proto(message: Any) -> WireTensor:
    """Raises UserError for an unknown dtype or bytes that are not whole numbers."""
    dtype = _DTYPES.get(message.dtype)
    if dtype is None:
        raise UserError(f"has an unknown dtype ({message.dtype})")
    _check_dimensions(len(message.shape))
    shape = tuple(message.shape)
    if any(size < 0 for size in shape):
        raise UserError(f"has shape {list(shape)}")
    if not message.HasField("sparse_csr"):
        return WireTensor(_read(message.dense, dtype), shape)
    sparse = message.sparse_csr
    return WireTensor(
        _read(sparse.values, dtype),
        shape,
        _read(sparse.crow_indices, _INDEX),
        _read(sparse.col_indices, _INDEX),
    )


def tensor_from_json(value: Any) -> WireTensor:
    """Raises UserError when ``value`` is not {"data": [numbers], "dtype", "shape"?, "sparse_..."?}."""
    if not isinstance(value, dict):
        raise UserError("is not a tensor object")
    dtype = value.get("dtype")
    if dtype not in ("int64", "float32"):
        raise UserError(f"has dtype {shown(dtype)}; int64 and float32 are possible")
    data = value.get("data")
    values = numbers(data if data is not None else [], allow_float=dtype == "float32")
    with np.errstate(over="ignore"):
        values = values.astype(np.float32 if dtype == "float32" else np.int64, copy=False)
    shape = value.get("shape") or []
    if not isinstance(shape, list) or not all(type(size) is int and size >= 0 for size in shape):
        raise UserError("has a shape that is no list of whole numbers from 0")
    _check_dimensions(len(shape))
    crow, col = value.get("sparse_crow_indices"), value.get("sparse_col_indices")
    if crow is None:
        return WireTensor(values, tuple(shape))
    return WireTensor(values, tuple(shape), numbers(crow), None if col is None else numbers(col))


def _check_dimensions(count: int) -> None:
    """Before a shape is shown: it may have millions."""
    if count > 2:
        raise UserError(f"has {count} dimensions; 1 or 2 are possible")


def numbers(values: Any, allow_float: bool = False) -> Array:
    """A JSON list as a flat array: int64, or float64 where ``allow_float``. Raises UserError."""
    kind = "numbers" if allow_float else "whole numbers"
    if not isinstance(values, list):
        raise UserError(f"is not a list of {kind}")
    if not values:
        return np.zeros(0, np.float64 if allow_float else np.int64)
    # Before numpy sees them: one long text among them would make it reserve as much for each.
    if not _NUMBERS[allow_float].issuperset(map(type, values)):
        raise UserError(f"is not a flat list of {kind}")
    try:
        array = np.array(values)
    except (ValueError, OverflowError):
        raise UserError(f"is not a flat list of {kind}") from None
    if array.ndim != 1 or array.dtype.kind not in ("if" if allow_float else "i"):
        raise UserError(f"is not a flat list of {kind} that fit 64 bits")
    return array


def text_tokens_from_proto(chunks: Sequence[Any], max_chunks: float = math.inf) -> Array:
    """The tokens of a datum's text chunks, end to end: int32 [N]."""
    _check_chunks(len(chunks), max_chunks)
    parts = []
    for position, chunk in enumerate(chunks):
        kind = chunk.WhichOneof("value")
        if kind != "encoded_text":
            raise UserError(_not_text(position, kind))
        parts.append(chunk.encoded_text.tokens)
    return _read(parts[0] if len(parts) == 1 else b"".join(parts), np.dtype("<i4"))


def text_tokens_from_json(
    model_input: Any, max_chunks: float = math.inf, max_tokens: float = math.inf
) -> Array:
    """The tokens of ``{"chunks": [...]}``, end to end: int64 [N]. Old clients send no chunk type, so a
    chunk is told by its keys. Raises UserError, for more than ``max_tokens`` before they are looked at."""
    chunks = model_input.get("chunks") if isinstance(model_input, dict) else None
    if not isinstance(chunks, list):
        raise UserError("has no list of chunks")
    _check_chunks(len(chunks), max_chunks)
    lists = [chunk.get("tokens") for chunk in chunks if isinstance(chunk, dict)]
    num_tokens = sum(len(tokens) for tokens in lists if isinstance(tokens, list))
    if num_tokens > max_tokens:
        raise UserError(f"has {num_tokens} tokens; at most {max_tokens} are possible")
    parts = []
    for position, chunk in enumerate(chunks):
        if not isinstance(chunk, dict) or "tokens" not in chunk:
            raise UserError(_not_text(position, _json_kind(chunk)))
        try:
            parts.append(numbers(chunk["tokens"]))
        except UserError as error:
            raise UserError(f"chunks[{position}].tokens {error}") from None
    return np.concatenate(parts) if parts else np.zeros(0, np.int64)


def _check_chunks(num_chunks: int, max_chunks: float) -> None:
    if num_chunks > max_chunks:
        raise UserError(f"has {num_chunks} chunks; at most {max_chunks} are possible, one for each token")


def _json_kind(chunk: Any) -> str | None:
    for key, kind in (("location", "image"), ("format", "image"), ("dmel", "dmel")):
        if isinstance(chunk, dict) and key in chunk:
            return kind
    return None


def _not_text(position: int, kind: str | None) -> str:
    what = {"image": "an image", "dmel": "audio"}.get(kind or "", "not a known chunk")
    return f"chunks[{position}] is {what}; only encoded text is served"


def _read(data: bytes, dtype: np.dtype[Any]) -> Array:
    if len(data) % dtype.itemsize:
        raise UserError(f"has {len(data)} bytes, which is not a multiple of {dtype.itemsize}")
    array = np.frombuffer(data, dtype)
    if dtype.kind == "u":  # bfloat16: the upper half of a float32
        return (array.astype(np.uint32) << 16).view(np.float32)
    return array
