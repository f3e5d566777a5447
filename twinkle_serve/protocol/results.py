"""Results as the bytes a client expects: protobuf for those that accept it, JSON otherwise.

JSON here never holds NaN or Infinity, which the SDK cannot parse, nor fields that are null: a null ``error``
is a failure to it, and a null ``path`` a path. Knows the two encodings. Does not know promises.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import orjson

from twinkle_serve.protocol import schema
from twinkle_serve.protocol.data import Column, ForwardResult, Listed, SampledSequence, SampleResult, TopK
from twinkle_serve.protocol.errors import UserError
from twinkle_serve.protocol.tensors import Array

PROTOBUF = "application/x-protobuf"
JSON = "application/json"
MAX_JSON_CELLS = 2**22
_OUTPUT_TYPE = "TorchLossReturn"
# What the SDK itself puts into a cell that holds no logprob.
_NO_LOGPROB = -99999.0


def encode_result(value: Any, accept: str) -> tuple[bytes, str]:
    """The body and content type of a finished promise.

    value: ForwardResult, SampleResult, a dict (sent as JSON, metrics of a step below "metrics") or None.
    Raises UserError for a result that is too large for JSON.
    """
    protobuf = PROTOBUF in accept
    cells = 0 if protobuf else num_cells(value)
    if cells > MAX_JSON_CELLS:
        raise UserError(
            f"this result has {cells} numbers; as JSON at most {MAX_JSON_CELLS} are told, so ask "
            f"for it with Accept: {PROTOBUF}, as SDKs since 0.19 do"
        )
    if isinstance(value, ForwardResult):
        return (forward_proto(value), PROTOBUF) if protobuf else (dump(forward_json(value)), JSON)
    if isinstance(value, SampleResult):
        return (sample_proto(value), PROTOBUF) if protobuf else (dump(sample_json(value)), JSON)
    assert value is None or isinstance(value, Mapping), type(value)
    return dump(object_json(value or {})), JSON


def num_cells(value: Any) -> int:
    """About how many numbers a result has, which is what its encoding takes time for."""
    if isinstance(value, ForwardResult):
        return int(value.logprobs.values.size)
    if isinstance(value, SampleResult):
        told: list[Array | None] = [value.prompt_logprobs, value.target_prompt_logprobs]
        tops = [value.topk_prompt, value.prompt_alternatives, *(each.topk for each in value.sequences)]
        told += [top.token_ids for top in tops if top is not None]
        told += [sequence.tokens for sequence in value.sequences]
        return sum(array.size for array in told if array is not None)
    return 0


def dump(value: Any) -> bytes:
    return orjson.dumps(value, option=orjson.OPT_SERIALIZE_NUMPY | orjson.OPT_NON_STR_KEYS)


def object_json(value: Mapping[str, Any]) -> dict[str, Any]:
    """A plain result. One of numbers only is the metrics of an optimizer step."""
    if value and all(isinstance(item, int | float) for item in value.values()):
        value = {"metrics": value}
    return {key: _finite(item) for key, item in value.items() if item is not None}


def _finite(value: Any) -> Any:
    """``value`` without the entries of its objects that are not finite."""
    if isinstance(value, Mapping):
        return {
            key: _finite(item)
            for key, item in value.items()
            if not (isinstance(item, float) and not math.isfinite(item))
        }
    return value


# forward and forward_backward --------------------------------------------------------------------


def forward_proto(result: ForwardResult) -> bytes:
    """ForwardBackwardOutput: one record for each run of datums that share a width."""
    message = schema.ForwardBackwardOutput(loss_fn_output_type=_OUTPUT_TYPE)
    for key, value in result.metrics.items():
        message.metrics[key] = value
    values, ends = _float_values(result.logprobs), _element_ends(result.logprobs, result.lengths)
    widths = result.logprobs.widths
    cuts = np.flatnonzero(np.diff(widths)) + 1
    for first, last in zip([0, *cuts.tolist()], [*cuts.tolist(), len(widths)], strict=True):
        record = message.loss_fn_outputs.add(type_tag=_OUTPUT_TYPE, num_datums=last - first)
        field = record.fields["logprobs"]
        field.dtype = schema.FLOAT32
        field.data = values[ends[first] : ends[last]].tobytes()
        field.offsets = ((ends[first : last + 1] - ends[first]) * 4).tobytes()
        if widths[first]:
            field.trailing_shape.append(int(widths[first]))
    data: bytes = message.SerializeToString()
    return data


def forward_json(result: ForwardResult) -> dict[str, Any]:
    """The form of SDKs up to 0.18. Tensors hold data, dtype and shape and nothing else."""
    values, ends = _finite_values(result.logprobs), _element_ends(result.logprobs, result.lengths)
    outputs = []
    for index, (length, width) in enumerate(zip(result.lengths, result.logprobs.widths, strict=True)):
        shape = [int(length), int(width)] if width else [int(length)]
        data = values[ends[index] : ends[index + 1]]
        outputs.append({"logprobs": {"data": data, "dtype": "float32", "shape": shape}})
    metrics = {key: value for key, value in result.metrics.items() if math.isfinite(value)}
    return {"loss_fn_output_type": _OUTPUT_TYPE, "loss_fn_outputs": outputs, "metrics": metrics}


def _element_ends(column: Column, lengths: Array) -> Array:
    """int64 [num_datums + 1]: where each datum's elements start, and the total."""
    sizes = lengths.astype(np.int64) * np.maximum(1, column.widths)
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(sizes, dtype=np.int64)])


def _float_values(column: Column) -> Array:
    return np.ascontiguousarray(column.values, np.float32)


def _finite_values(column: Column) -> Array:
    return _finite_array(_float_values(column))


def _finite_array(values: Array) -> Array:
    return np.nan_to_num(values.astype(np.float32), nan=_NO_LOGPROB, neginf=_NO_LOGPROB, posinf=-_NO_LOGPROB)


# asample -----------------------------------------------------------------------------------------


def sample_proto(result: SampleResult) -> bytes:
    """SampleResponse."""
    message = schema.SampleResponse(prompt_cache_hit_tokens=result.prompt_cache_hit_tokens)
    for sequence in result.sequences:
        message.sequences.append(_sequence_proto(sequence))
    if result.prompt_logprobs is not None:
        message.prompt_logprobs = result.prompt_logprobs.astype("<f4").tobytes()
    if result.topk_prompt is not None:
        _write_topk(message.topk_prompt_logprobs, result.topk_prompt)
    if result.target_prompt_logprobs is not None:
        _write_matrix(message.target_prompt_logprobs, result.target_prompt_logprobs, result.target_cells)
    if result.prompt_alternatives is not None:
        alternatives = message.prompt_alt_tokens
        _write_tensor(alternatives.tokens, result.prompt_alternatives.token_ids.astype("<i8"))
        _write_tensor(alternatives.logprobs, result.prompt_alternatives.logprobs.astype("<f4"))
    data: bytes = message.SerializeToString()
    return data


def sample_json(result: SampleResult) -> dict[str, Any]:
    """The form of SDKs up to 0.18."""
    body: dict[str, Any] = {
        "type": "sample",
        "sequences": [
            {
                "stop_reason": _stop_reason(sequence),
                "tokens": sequence.tokens.tolist(),
                "logprobs": _finite_array(sequence.logprobs).tolist(),
            }
            for sequence in result.sequences
        ],
    }
    if result.prompt_logprobs is not None:
        body["prompt_logprobs"] = [x if math.isfinite(x) else None for x in result.prompt_logprobs.tolist()]
    if result.topk_prompt is not None:
        body["topk_prompt_logprobs"] = _topk_json(result.topk_prompt)
    return body


def _sequence_proto(sequence: SampledSequence) -> Any:
    message = schema.SampledSequence(
        stop_reason=schema.STOP if _stop_reason(sequence) == "stop" else schema.LENGTH,
        tokens=sequence.tokens.astype("<i4").tobytes(),
        logprobs=sequence.logprobs.astype("<f4").tobytes(),
    )
    if sequence.topk is not None:
        _write_topk(message.topk_sampled_logprobs, sequence.topk)
    return message


def _stop_reason(sequence: SampledSequence) -> str:
    """Clients know two reasons only."""
    return "length" if sequence.stop_reason == "length" else "stop"


def _write_topk(message: Any, topk: TopK) -> None:
    message.length, message.k = topk.token_ids.shape
    message.token_ids = topk.token_ids.astype("<i4").tobytes()
    message.logprobs = topk.logprobs.astype("<f4").tobytes()


def _topk_json(topk: TopK) -> list[orjson.Fragment | None]:
    """Each row as it is written, for as Python's objects all of them would take ten times the memory."""
    rows: list[orjson.Fragment | None] = []
    for ids, logprobs in zip(topk.token_ids, topk.logprobs, strict=True):
        pairs = zip(ids.tolist(), logprobs.tolist(), strict=True)
        cells = [(i, x) for i, x in pairs if math.isfinite(x) and x > _NO_LOGPROB]
        rows.append(orjson.Fragment(orjson.dumps(cells)) if cells else None)
    return rows


def _write_tensor(message: Any, array: Array) -> None:
    message.dense = np.ascontiguousarray(array).tobytes()
    message.dtype = schema.INT64 if array.dtype.kind == "i" else schema.FLOAT32
    message.shape.extend(array.shape)


def _write_matrix(message: Any, matrix: npt.NDArray[np.float32], cells: Listed | None) -> None:
    """In the layout in which it was asked for."""
    if cells is None:
        _write_tensor(message, matrix.astype("<f4"))
        return
    message.sparse_csr.values = cells.of(matrix).astype("<f4").tobytes()
    message.sparse_csr.crow_indices = cells.starts.astype("<i8").tobytes()
    message.sparse_csr.col_indices = cells.columns.astype("<i8").tobytes()
    message.dtype = schema.FLOAT32
    message.shape.extend(matrix.shape)
