"""The protobuf messages of the tinker wire, built at import from the text below.

Field names and numbers are the client's. The messages live in a pool and a package of their own, so
that importing ``tinker`` in the same process cannot clash. Knows no numpy and no meaning of a field.
"""

from __future__ import annotations

import re
from typing import Any

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

_PACKAGE = "twinkle_wire"

_ENUMS = {
    "StopReason": "STOP_REASON_STOP=0 STOP_REASON_LENGTH=1",
    "DType": "DTYPE_UNSPECIFIED=0 DTYPE_FLOAT32=1 DTYPE_INT64=2 DTYPE_INT32=3 DTYPE_BFLOAT16=4",
}

# One field a line: "label type name = number"; "a|b" as label means one arm of the message's oneof.
_MESSAGES = {
    "SampleResponse": """
        repeated SampledSequence sequences=1; optional bytes prompt_logprobs=2
        optional TopkLogprobs topk_prompt_logprobs=3; int32 prompt_cache_hit_tokens=4
        optional Tensor target_prompt_logprobs=5; optional PromptAltTokens prompt_alt_tokens=6""",
    "PromptAltTokens": "Tensor tokens=1; Tensor logprobs=2",
    "SampledSequence": """
        StopReason stop_reason=1; bytes tokens=2; optional bytes logprobs=3
        optional TopkLogprobs topk_sampled_logprobs=4""",
    "TopkLogprobs": "bytes token_ids=1; bytes logprobs=2; uint32 k=3; uint32 length=4",
    "SparseCsr": "bytes values=1; bytes crow_indices=2; bytes col_indices=3",
    "Tensor": """
        oneof bytes dense=1; oneof SparseCsr sparse_csr=2; DType dtype=3; repeated int64 shape=4""",
    "BatchedTensor": "bytes data=1; bytes offsets=2; DType dtype=3; repeated int64 trailing_shape=4",
    "ArrayRecord": "string type_tag=1; map BatchedTensor fields=2; int64 num_datums=3",
    "ForwardBackwardOutput": """
        string loss_fn_output_type=1; repeated ArrayRecord loss_fn_outputs=2; map double metrics=3""",
    "ForwardBackwardRequest": """
        string model_id=1; int32 seq_id=2; repeated Datum data=3; string loss_fn=4
        map double loss_fn_config=5; bool forward_only=6; map LossConfigValue loss_fn_config_v2=7""",
    "LossConfigValue": "oneof double number=1; oneof string text=2",
    # Fields 3 and 4, the provenance of tokens, are not read and therefore not declared.
    "Datum": "repeated Chunk model_input=1; map Tensor loss_fn_inputs=2",
    "Chunk": "oneof EncodedTextChunk encoded_text=1; oneof ImageChunk image=2; oneof DmelChunk dmel=3",
    "EncodedTextChunk": "bytes tokens=1",
    "ImageChunk": "bytes data=1; string format=2; optional int32 expected_tokens=3",
    "DmelChunk": "bytes dmel=1",
}

_FIELD = re.compile(r"(?:(repeated|optional|oneof|map) )?(\w+) (\w+)=(\d+)")
_SCALARS = ("double", "int64", "int32", "uint32", "bool", "string", "bytes")
_Field = descriptor_pb2.FieldDescriptorProto


def _build_file() -> descriptor_pb2.FileDescriptorProto:
    file = descriptor_pb2.FileDescriptorProto(name=f"{_PACKAGE}.proto", package=_PACKAGE, syntax="proto3")
    for name, values in _ENUMS.items():
        enum = file.enum_type.add(name=name)
        for value in values.split():
            label, number = value.split("=")
            enum.value.add(name=label, number=int(number))
    for name, text in _MESSAGES.items():
        message = file.message_type.add(name=name)
        optionals = []
        for label, type_name, field_name, number in _FIELD.findall(text):
            field = message.field.add(name=field_name, number=int(number), label=_Field.LABEL_OPTIONAL)
            _set_type(field, type_name)
            if label == "repeated":
                field.label = _Field.LABEL_REPEATED
            elif label == "map":
                _make_map(message, field, name)
            elif label == "oneof":
                field.oneof_index = 0
            elif label == "optional":
                optionals.append(field)
        if any(field.HasField("oneof_index") for field in message.field):
            message.oneof_decl.add(name="value")
        # proto3 "optional" is a oneof of one arm; such oneofs must come after the real ones.
        for field in optionals:
            field.proto3_optional = True
            field.oneof_index = len(message.oneof_decl)
            message.oneof_decl.add(name=f"_{field.name}")
    return file


def _set_type(field: Any, type_name: str) -> None:
    if type_name in _SCALARS:
        field.type = getattr(_Field, f"TYPE_{type_name.upper()}")
    else:
        field.type = _Field.TYPE_ENUM if type_name in _ENUMS else _Field.TYPE_MESSAGE
        field.type_name = f".{_PACKAGE}.{type_name}"


def _make_map(message: Any, field: Any, message_name: str) -> None:
    """Turn ``field`` into map<string, its type>: on the wire a list of key and value pairs."""
    entry_name = "".join(part.capitalize() for part in field.name.split("_")) + "Entry"
    entry = message.nested_type.add(name=entry_name)
    entry.options.map_entry = True
    entry.field.add(name="key", number=1, type=_Field.TYPE_STRING, label=_Field.LABEL_OPTIONAL)
    value = entry.field.add(name="value", number=2, type=field.type, label=_Field.LABEL_OPTIONAL)
    if field.HasField("type_name"):
        value.type_name = field.type_name
    field.type, field.label = _Field.TYPE_MESSAGE, _Field.LABEL_REPEATED
    field.type_name = f".{_PACKAGE}.{message_name}.{entry_name}"


_pool = descriptor_pool.DescriptorPool()
_pool.Add(_build_file())


def _message_class(name: str) -> Any:
    return message_factory.GetMessageClass(_pool.FindMessageTypeByName(f"{_PACKAGE}.{name}"))


ForwardBackwardRequest = _message_class("ForwardBackwardRequest")
ForwardBackwardOutput = _message_class("ForwardBackwardOutput")
SampleResponse = _message_class("SampleResponse")
SampledSequence = _message_class("SampledSequence")

STOP, LENGTH = 0, 1
FLOAT32, INT64, INT32, BFLOAT16 = 1, 2, 3, 4
