"""Training data and results as flat numpy arrays, and their compact byte form.

Knows how datums of unequal length lie end to end. Does not know the tinker wire format (codec.py),
torch, or what a loss does with a column.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

_MAGIC = b"TWB1"


@dataclass(frozen=True, slots=True)
class Column:
    """One named per-position tensor of every datum in a batch, laid end to end.

    values: flat array; datum d contributes ``lengths[d] * max(1, widths[d])`` elements, row-major.
    widths: int32 [num_datums]; 0 where the datum's tensor is 1-D ``[N]``, else K of ``[N, K]``.
    """

    values: npt.NDArray[np.generic]
    widths: npt.NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class DatumBatch:
    """The datums of one forward or forward_backward request.

    tokens: int32 [sum(lengths)], every datum's model_input end to end.
    lengths: int64 [num_datums], tokens per datum, each >= 1.
    columns: loss inputs by name; ``target_tokens`` is int64, everything else float32.
    """

    tokens: npt.NDArray[np.int32]
    lengths: npt.NDArray[np.int64]
    columns: Mapping[str, Column] = field(default_factory=dict)

    @property
    def num_datums(self) -> int:
        return len(self.lengths)

    @property
    def num_tokens(self) -> int:
        return int(self.tokens.size)

    def select(self, indices: Sequence[int]) -> DatumBatch:
        """The same batch with only the datums at ``indices``, in that order."""
        starts = np.concatenate([[0], np.cumsum(self.lengths)])
        tokens = [self.tokens[starts[d] : starts[d + 1]] for d in indices]
        columns = {}
        for name, column in self.columns.items():
            sizes = self.lengths * np.maximum(1, column.widths)
            ends = np.concatenate([[0], np.cumsum(sizes)])
            parts = [column.values[ends[d] : ends[d + 1]] for d in indices]
            columns[name] = Column(np.concatenate(parts), column.widths[list(indices)])
        return DatumBatch(np.concatenate(tokens), self.lengths[list(indices)], columns)

    def pack(self) -> bytes:
        """Bytes that ``unpack`` turns back into an equal batch; safe to keep in a journal."""
        arrays: dict[str, npt.NDArray[np.generic]] = {"tokens": self.tokens, "lengths": self.lengths}
        for name, column in self.columns.items():
            arrays[f"values/{name}"] = column.values
            arrays[f"widths/{name}"] = column.widths
        header = json.dumps([[name, a.dtype.str, a.size] for name, a in arrays.items()]).encode()
        parts = [_MAGIC, struct.pack("<I", len(header)), header]
        parts += [np.ascontiguousarray(a).tobytes() for a in arrays.values()]
        return b"".join(parts)

    @classmethod
    def unpack(cls, data: bytes | memoryview) -> DatumBatch:
        """The inverse of ``pack``; the arrays are read-only views of ``data``.

        Raises ValueError when ``data`` was not made by ``pack`` or is cut short.
        """
        view = memoryview(data)
        if bytes(view[:4]) != _MAGIC or len(view) < 8:
            raise ValueError("not a packed datum batch")
        (header_size,) = struct.unpack("<I", view[4:8])
        offset = 8 + header_size
        arrays = {}
        for name, dtype, size in json.loads(bytes(view[8:offset])):
            arrays[name] = np.frombuffer(view, dtype=np.dtype(dtype), count=size, offset=offset)
            offset += arrays[name].nbytes
        columns = {
            name.removeprefix("values/"): Column(values, arrays[f"widths/{name.removeprefix('values/')}"])
            for name, values in arrays.items()
            if name.startswith("values/")
        }
        return cls(arrays["tokens"], arrays["lengths"], columns)


@dataclass(frozen=True, slots=True)
class LoraSpec:
    """What a run's adapter is: rank 1..32, the seed of its A factors, and what it trains."""

    rank: int
    seed: int = 0
    train_attn: bool = True
    train_mlp: bool = True
    train_unembed: bool = True


@dataclass(frozen=True, slots=True)
class AdamParams:
    """Hyperparameters of one AdamW step; defaults are the SDK's. ``grad_clip_norm`` 0 means off."""

    learning_rate: float = 1e-4
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-12
    weight_decay: float = 0.0
    grad_clip_norm: float = 0.0


@dataclass(frozen=True, slots=True)
class ForwardResult:
    """The outcome of one forward or forward_backward request.

    logprobs: float32 column shaped like the request's ``target_tokens``.
    lengths: int64 [num_datums], positions per datum.
    metrics: finite numbers; every name holds exactly one colon and ``loss:sum`` is always there.
    """

    logprobs: Column
    lengths: npt.NDArray[np.int64]
    metrics: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How tokens are drawn. ``max_tokens`` None means up to the context limit; temperature 0 is greedy;
    top_k <= 0 and top_p 1.0 are off.

    stop_token_ids: generation ends after one of these, and the token is kept. stop_strings: it ends once
    the decoded text contains one. Both empty means nothing stops but ``max_tokens``.
    """

    max_tokens: int | None = None
    temperature: float = 1.0
    top_k: int = -1
    top_p: float = 1.0
    seed: int | None = None
    stop_token_ids: tuple[int, ...] = ()
    stop_strings: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Listed:
    """Which cells of a matrix a client named, where it did not send all, as in CSR: those of row r are in
    ``columns[starts[r] : starts[r + 1]]``. Both int64, [rows + 1] and [cells]."""

    starts: npt.NDArray[np.int64]
    columns: npt.NDArray[np.int64]

    def of(self, matrix: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        """What ``matrix`` has in these cells, [cells]."""
        rows = np.repeat(np.arange(matrix.shape[0]), np.diff(self.starts))
        return matrix[rows, self.columns]


@dataclass(frozen=True, slots=True)
class SampleRequest:
    """One ``asample``: a prompt (int32 [P]), how many samples, and which logprobs to report.

    target_prompt_tokens: int64 [P-1, K] whose logprobs at each prompt position are wanted, -1 = skip.
    target_cells: those the client named, which are all that it is told of; None: all.
    prompt_logprobs_last_n: of prompt_logprobs and topk_prompt_logprobs only the last n positions are scored;
    the others are NaN or empty.
    """

    prompt: npt.NDArray[np.int32]
    params: SamplingParams
    num_samples: int = 1
    prompt_logprobs: bool = False
    topk_prompt_logprobs: int = 0
    topk_sample_logprobs: int = 0
    target_prompt_tokens: npt.NDArray[np.int64] | None = None
    target_cells: Listed | None = None
    prompt_alt_tokens_k: int = 0
    prompt_logprobs_last_n: int | None = None

    @property
    def num_bytes(self) -> int:
        """What it holds until it is answered, what is found out about its prompt included."""
        stops = sum(len(text.encode()) for text in self.params.stop_strings)
        targets = 0 if self.target_prompt_tokens is None else self.target_prompt_tokens.nbytes
        if self.target_cells is not None:
            targets += self.target_cells.starts.nbytes + self.target_cells.columns.nbytes
        # A token and its logprob each, at all positions: also at those that last_n leaves empty.
        found = 8 * self.prompt.size * (self.topk_prompt_logprobs + self.prompt_alt_tokens_k)
        return self.prompt.nbytes + stops + targets + found


@dataclass(frozen=True, slots=True)
class TopK:
    """The k best tokens at each of L positions: int32 and float32 [L, k]; an empty cell is (0, -99999.0)."""

    token_ids: npt.NDArray[np.int32]
    logprobs: npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class SampledSequence:
    """tokens int32 [n] (the stop token included), logprobs float32 [n], stop_reason "stop" or "length"."""

    tokens: npt.NDArray[np.int32]
    logprobs: npt.NDArray[np.float32]
    stop_reason: str
    topk: TopK | None = None


@dataclass(frozen=True, slots=True)
class SampleDelta:
    """What sequence ``index`` of a sample has grown by; the other fields are those of SampledSequence."""

    index: int
    tokens: npt.NDArray[np.int32]
    logprobs: npt.NDArray[np.float32]
    topk: TopK | None = None


@dataclass(frozen=True, slots=True)
class SampleResult:
    """prompt_logprobs float32 [P], NaN at 0 and wherever not scored; the rest as asked for.

    target_prompt_logprobs: float32 [P-1, K], of which ``target_cells`` are told; None: all.
    """

    sequences: tuple[SampledSequence, ...]
    prompt_logprobs: npt.NDArray[np.float32] | None = None
    topk_prompt: TopK | None = None
    target_prompt_logprobs: npt.NDArray[np.float32] | None = None
    target_cells: Listed | None = None
    prompt_alternatives: TopK | None = None
    prompt_cache_hit_tokens: int = 0
