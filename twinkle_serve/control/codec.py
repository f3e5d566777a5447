"""Commands and results as bytes that a later version can still read: a JSON header, then raw arrays.

Knows every kind of command and result. Does not know where the bytes are kept, and never unpickles.
"""

from __future__ import annotations

import dataclasses
import json
import struct
from collections.abc import Mapping
from typing import Any

import numpy as np

from twinkle_serve.control.backend import (
    LoadCommand,
    OptimCommand,
    PassCommand,
    RejectedCommand,
    SaveCommand,
    SnapshotCommand,
    UnloadCommand,
)
from twinkle_serve.control.commands import BirthCommand, RunCommand
from twinkle_serve.protocol.data import AdamParams, Column, ForwardResult
from twinkle_serve.protocol.work import Failure

_MAGIC = b"TWC1"
_KINDS: dict[str, type[Any]] = {
    "birth": BirthCommand,
    "pass": PassCommand,
    "optim": OptimCommand,
    "save": SaveCommand,
    "snapshot": SnapshotCommand,
    "load": LoadCommand,
    "unload": UnloadCommand,
    "rejected": RejectedCommand,
}
_NAMES = {kind: name for name, kind in _KINDS.items()}


def encode_command(command: RunCommand) -> bytes:
    """Bytes that ``decode_command`` turns into an equal command."""
    name = _NAMES[type(command)]
    if isinstance(command, PassCommand):
        fields = {
            "lengths": list(command.lengths),
            "loss_fn": command.loss_fn,
            "loss_config": dict(command.loss_config),
            "backward": command.backward,
            "loss_tokens": command.loss_tokens,
        }
        return _join({"kind": name, "fields": fields}, command.datums)
    return _join({"kind": name, "fields": dataclasses.asdict(command)})


def decode_command(data: bytes) -> RunCommand:
    """Raises ValueError for bytes that ``encode_command`` did not make."""
    header, rest = _split(data)
    kind = _KINDS.get(header["kind"])
    if kind is None:
        raise ValueError(f"unknown kind of command {header['kind']!r}")
    fields: dict[str, Any] = header["fields"]
    if kind is PassCommand:
        fields = fields | {"lengths": tuple(fields["lengths"]), "datums": rest}
    elif kind is OptimCommand:
        fields = {"params": AdamParams(**fields["params"])}
    elif kind is RejectedCommand:
        fields = {"failure": Failure(**fields["failure"])}
    elif kind is SaveCommand:
        fields = fields | {"age_recipients": tuple(fields.get("age_recipients", ()))}
    command: RunCommand = kind(**fields)
    return command


def encode_result(value: Any, failure: Failure | None) -> bytes:
    """What a promise was settled with: a failure, a ForwardResult, or anything that JSON can hold."""
    if failure is not None:
        return _join({"kind": "failure", "fields": dataclasses.asdict(failure)})
    if isinstance(value, ForwardResult):
        arrays = (value.logprobs.values, value.logprobs.widths, value.lengths)
        described = [[array.dtype.str, array.size] for array in arrays]
        header = {"kind": "forward", "arrays": described, "metrics": dict(value.metrics)}
        return _join(header, b"".join(np.ascontiguousarray(array).tobytes() for array in arrays))
    return _join({"kind": "json", "value": dict(value) if isinstance(value, Mapping) else value})


def decode_result(data: bytes) -> tuple[Any, Failure | None]:
    """The value and the failure. Raises ValueError for bytes that ``encode_result`` did not make."""
    header, rest = _split(data)
    match header["kind"]:
        case "failure":
            return None, Failure(**header["fields"])
        case "json":
            return header["value"], None
        case "forward":
            arrays, offset = [], 0
            for dtype, size in header["arrays"]:
                arrays.append(np.frombuffer(rest, np.dtype(dtype), size, offset))
                offset += arrays[-1].nbytes
            values, widths, lengths = arrays
            return ForwardResult(Column(values, widths), lengths, header["metrics"]), None
    raise ValueError(f"unknown kind of result {header['kind']!r}")


def _join(header: Mapping[str, Any], rest: bytes = b"") -> bytes:
    text = json.dumps(header).encode()
    return b"".join([_MAGIC, struct.pack("<I", len(text)), text, rest])


def _split(data: bytes) -> tuple[dict[str, Any], bytes]:
    if data[:4] != _MAGIC or len(data) < 8:
        raise ValueError("not made by this codec")
    (size,) = struct.unpack("<I", data[4:8])
    return json.loads(data[8 : 8 + size]), data[8 + size :]
