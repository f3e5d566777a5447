"""Our messages against the SDK's own: same numbers, types and presence, so either side reads the other."""

from __future__ import annotations

from typing import Any

import pytest
from tinker.proto import tinker_public_pb2

from twinkle_serve.protocol import schema

# Fields we never read.
IGNORED = {"model_input_spans", "loss_fn_input_spans", "override_dimensions"}


@pytest.mark.parametrize("name", ["ForwardBackwardRequest", "ForwardBackwardOutput", "SampleResponse"])
def test_messages_match_the_sdks(name: str) -> None:
    seen: set[str] = set()
    _compare(getattr(schema, name).DESCRIPTOR, getattr(tinker_public_pb2, name).DESCRIPTOR, seen)
    assert len(seen) >= 3


def _compare(ours: Any, theirs: Any, seen: set[str]) -> None:
    if ours.full_name in seen:
        return
    seen.add(ours.full_name)
    missing = set(theirs.fields_by_name) - set(ours.fields_by_name)
    assert missing <= IGNORED
    for field in ours.fields:
        other = theirs.fields_by_name[field.name]
        for aspect in ("number", "type", "is_repeated", "has_presence"):
            assert getattr(field, aspect) == getattr(other, aspect), (field.full_name, aspect)
        if field.message_type:
            assert field.message_type.GetOptions().map_entry == other.message_type.GetOptions().map_entry
            _compare(field.message_type, other.message_type, seen)
        if field.enum_type:
            ours_values = {value.name: value.number for value in field.enum_type.values}
            assert ours_values == {value.name: value.number for value in other.enum_type.values}


def test_constants_match_the_enums() -> None:
    assert tinker_public_pb2.DType.Value("DTYPE_FLOAT32") == schema.FLOAT32
    assert tinker_public_pb2.DType.Value("DTYPE_INT64") == schema.INT64
    assert tinker_public_pb2.DType.Value("DTYPE_INT32") == schema.INT32
    assert tinker_public_pb2.DType.Value("DTYPE_BFLOAT16") == schema.BFLOAT16
    assert tinker_public_pb2.STOP_REASON_STOP == schema.STOP
    assert tinker_public_pb2.STOP_REASON_LENGTH == schema.LENGTH


def test_the_pool_is_our_own() -> None:
    assert schema.SampleResponse.DESCRIPTOR.file.package == "twinkle_wire"
    assert schema.SampleResponse.DESCRIPTOR.file.pool is not tinker_public_pb2.DESCRIPTOR.pool
