"""Request bodies as the SDK writes them, protobuf by its own encoder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tinker import types
from tinker.proto.request_conv import forward_backward_request_to_proto
from tinker.types.forward_backward_input import ForwardBackwardInput
from tinker.types.forward_backward_request import ForwardBackwardRequest

PROTO = {"Content-Type": "application/x-protobuf"}
RUN = "session-1:train:0"


def datum(tokens: Sequence[int], **inputs: types.TensorData | Sequence[float]) -> types.Datum:
    return types.Datum(
        model_input=types.ModelInput.from_ints(list(tokens)),
        loss_fn_inputs={
            name: value if isinstance(value, types.TensorData) else _tensor(name, value)
            for name, value in inputs.items()
        },
    )


def cross_entropy(tokens: Sequence[int] = (1, 2, 3)) -> types.Datum:
    return datum(tokens, target_tokens=list(tokens), weights=[1.0] * len(tokens))


def forward_proto(
    data: Sequence[types.Datum],
    seq_id: int | None = 1,
    loss_fn: str = "cross_entropy",
    config: Mapping[str, Any] | None = None,
    forward_only: bool = False,
    model_id: str = RUN,
) -> bytes:
    given = ForwardBackwardInput(list(data), loss_fn, dict(config) if config else None)  # type: ignore[arg-type]
    request = ForwardBackwardRequest(given, model_id, seq_id)
    message = forward_backward_request_to_proto(request)
    message.forward_only = forward_only
    data_bytes: bytes = message.SerializeToString()
    return data_bytes


def forward_json(
    data: Sequence[Mapping[str, Any]], seq_id: int | None = 1, loss_fn: str = "cross_entropy"
) -> dict[str, Any]:
    """As 0.7.0 sends it: no ``type``, no defaults, explicit nulls."""
    given = {"data": list(data), "loss_fn": loss_fn, "loss_fn_config": None}
    return {"forward_backward_input": given, "model_id": RUN, "seq_id": seq_id}


def json_datum(tokens: Sequence[int], weights: Sequence[float] | None = None) -> dict[str, Any]:
    inputs: dict[str, Any] = {"target_tokens": {"data": list(tokens), "dtype": "int64"}}
    if weights is not None:
        inputs["weights"] = {"data": list(weights), "dtype": "float32", "shape": [len(weights)]}
    return {"model_input": {"chunks": [{"tokens": list(tokens)}]}, "loss_fn_inputs": inputs}


def _tensor(name: str, values: Sequence[float]) -> types.TensorData:
    kind = "int64" if name == "target_tokens" else "float32"
    return types.TensorData(data=list(values), dtype=kind, shape=[len(values)])
