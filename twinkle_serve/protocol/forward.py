"""forward and forward_backward requests, as protobuf or as JSON, to one checked batch.

Knows the two encodings of the envelope. Does not know who may train what, nor how it is computed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from google.protobuf.message import DecodeError

from twinkle_serve.protocol import schema
from twinkle_serve.protocol.batch import DatumLimits, DatumSource, assemble
from twinkle_serve.protocol.data import DatumBatch
from twinkle_serve.protocol.errors import MalformedBody, UserError
from twinkle_serve.protocol.graph_batch import assemble_for_graph
from twinkle_serve.protocol.loss_graph import GRAPH, loss_tokens, read_graph
from twinkle_serve.protocol.losses import UPLOADED, LossSpec, complete_config, find_loss
from twinkle_serve.protocol.requests import MAX_SEQ_ID
from twinkle_serve.protocol.showing import shown
from twinkle_serve.protocol.tensors import (
    Array,
    WireTensor,
    tensor_from_json,
    tensor_from_proto,
    text_tokens_from_json,
    text_tokens_from_proto,
)

_SEQ_ID_RULE = f"seq_id must be a whole number from 0 to {MAX_SEQ_ID}, got {{}}"


@dataclass(frozen=True, slots=True)
class ForwardEnvelope:
    """A request whose run and place are known but whose data nobody has looked at yet."""

    model_id: str
    seq_id: int | None
    forward_only: bool
    loss_fn: object
    loss_config: Mapping[str, object]
    source: DatumSource | None


@dataclass(frozen=True, slots=True)
class CheckedPass:
    """A request that can run: ``loss_config`` is complete, ``batch`` has the columns the loss reads.

    loss_tokens: what it costs at least for the sake of its loss.
    """

    batch: DatumBatch
    loss_fn: str
    loss_config: Mapping[str, float | str]
    backward: bool
    loss_tokens: int = 0


def check_pass(
    envelope: ForwardEnvelope, limits: DatumLimits, whitelist: Mapping[str, LossSpec] | None = None
) -> CheckedPass:
    """Raises UserError naming what is wrong."""
    loss = find_loss(envelope.loss_fn, whitelist or {})
    config = complete_config(loss, envelope.loss_config)
    if envelope.source is None:
        raise UserError("data is not a list of datums")
    batch = assemble(envelope.source, loss, config, limits)
    return CheckedPass(batch, loss.name, config, not envelope.forward_only)


def uploaded_loss_id(envelope: ForwardEnvelope) -> str | None:
    """The id of the uploaded loss that a request wants; None for any other loss. Raises UserError."""
    if envelope.loss_fn != UPLOADED:
        return None
    loss_id = envelope.loss_config.get("loss_id")
    if not isinstance(loss_id, str) or len(envelope.loss_config) != 1:
        raise UserError("loss_fn 'custom' needs loss_fn_config {'loss_id': ...} of create_custom_loss")
    return loss_id


def check_uploaded(envelope: ForwardEnvelope, graph: str, limits: DatumLimits) -> CheckedPass:
    """The same with an uploaded loss, whose text is ``graph``. Raises UserError."""
    if envelope.source is None:
        raise UserError("data is not a list of datums")
    nodes = read_graph(graph)
    batch = assemble_for_graph(envelope.source, nodes, limits)
    cost = loss_tokens(nodes, batch.num_datums)
    return CheckedPass(batch, UPLOADED, {GRAPH: graph}, not envelope.forward_only, cost)


def parse_proto(body: bytes) -> ForwardEnvelope:
    """Raises MalformedBody when the bytes are no ForwardBackwardRequest or name no run."""
    request = schema.ForwardBackwardRequest()
    try:
        request.ParseFromString(body)
    except DecodeError:
        raise MalformedBody("the body is not a ForwardBackwardRequest message") from None
    if not request.model_id:
        raise MalformedBody("model_id is missing")
    config: dict[str, object] = dict(request.loss_fn_config)
    if request.loss_fn_config_v2:
        config = {key: _config_value(value) for key, value in request.loss_fn_config_v2.items()}
    # proto3 cannot say "absent": the SDK counts from 1 and leaves 0 for callers without an order.
    seq_id = request.seq_id or None
    if seq_id is not None and seq_id < 0:
        raise MalformedBody(_SEQ_ID_RULE.format(seq_id))
    return ForwardEnvelope(
        request.model_id, seq_id, request.forward_only, request.loss_fn, config, _ProtoData(request.data)
    )


def parse_json(body: Mapping[str, Any], forward_only: bool) -> ForwardEnvelope:
    """``body`` of POST forward_backward or, with ``forward_only``, of POST forward. Raises MalformedBody
    when it names no run."""
    model_id, seq_id = address(body)
    given = body.get("forward_input" if forward_only else "forward_backward_input")
    inner: Mapping[str, Any] = given if isinstance(given, dict) else {}
    data, config = inner.get("data"), inner.get("loss_fn_config") or {}
    return ForwardEnvelope(
        model_id,
        seq_id,
        forward_only,
        inner.get("loss_fn"),
        config if isinstance(config, dict) else {"": config},
        _JsonData(data) if isinstance(data, list) else None,
    )


def address(body: Mapping[str, Any]) -> tuple[str, int | None]:
    """model_id and seq_id of any sequenced JSON request; seq_id None appends. Raises MalformedBody."""
    model_id, seq_id = body.get("model_id"), body.get("seq_id")
    if not isinstance(model_id, str) or not model_id:
        raise MalformedBody("model_id is missing")
    if seq_id is not None and (type(seq_id) is not int or not 0 <= seq_id <= MAX_SEQ_ID):
        raise MalformedBody(_SEQ_ID_RULE.format(shown(seq_id)))
    return model_id, seq_id


def _config_value(value: Any) -> object:
    kind = value.WhichOneof("value")
    return getattr(value, kind) if kind else None


class _ProtoData:
    """``data``: the message's own field. A list of it would have an object for each datum, however many a
    body of nothing but empty ones has, before anybody counts them."""

    def __init__(self, data: Sequence[Any]) -> None:
        self._data = data

    def __len__(self) -> int:
        return len(self._data)

    def tokens(self, index: int, max_chunks: int) -> Array:
        return text_tokens_from_proto(self._data[index].model_input, max_chunks)

    def tensor(self, index: int, name: str) -> WireTensor | None:
        inputs = self._data[index].loss_fn_inputs
        # Reading an absent key of a protobuf map would create it.
        return tensor_from_proto(inputs[name]) if name in inputs else None


class _JsonData:
    def __init__(self, data: list[Any]) -> None:
        self._data = data

    def __len__(self) -> int:
        return len(self._data)

    def tokens(self, index: int, max_chunks: int) -> Array:
        return text_tokens_from_json(self._field(index, "model_input"), max_chunks)

    def tensor(self, index: int, name: str) -> WireTensor | None:
        inputs = self._field(index, "loss_fn_inputs")
        if not isinstance(inputs, dict):
            return None
        value = inputs.get(name)
        return None if value is None else tensor_from_json(value)

    def _field(self, index: int, key: str) -> Any:
        datum = self._data[index]
        return datum.get(key) if isinstance(datum, dict) else None
