from __future__ import annotations

import tracemalloc
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from tinker import types
from tinker.proto.request_conv import _tensor_data_to_proto

from twinkle_serve.protocol import schema
from twinkle_serve.protocol.errors import UserError
from twinkle_serve.protocol.tensors import (
    WireTensor,
    numbers,
    tensor_from_json,
    tensor_from_proto,
    text_tokens_from_json,
    text_tokens_from_proto,
)

MANY = 10**6
shapes = hnp.array_shapes(min_dims=1, max_dims=2, max_side=6)
arrays = st.one_of(
    hnp.arrays(np.int64, shapes),
    hnp.arrays(np.float32, shapes, elements=st.floats(-1e6, 1e6, width=32)),
)


def proto(tensor: types.TensorData) -> Any:
    """Through the SDK's encoder and back by our schema."""
    message = schema.ForwardBackwardRequest().data.add().loss_fn_inputs["x"]
    message.ParseFromString(_tensor_data_to_proto(tensor).SerializeToString())
    return message


@given(arrays)
def test_dense_tensors_of_the_sdk_are_read_back(array: np.ndarray) -> None:
    wire = types.TensorData.from_numpy(array)
    width = array.shape[1] if array.ndim == 2 else 0
    for tensor in (
        tensor_from_proto(proto(wire)),
        tensor_from_json({"data": wire.data, "dtype": wire.dtype, "shape": wire.shape}),
    ):
        values, found = tensor.as_rows(array.shape[0], MANY)
        assert found == width
        assert values.dtype == array.dtype
        np.testing.assert_array_equal(values, array.ravel())


@given(
    hnp.arrays(
        np.int64,
        st.tuples(st.integers(1, 8), st.integers(1, 12)),
        elements=st.sampled_from([0, 0, 0, 0, 0, 0, 0, 7, -1]),
    )
)
def test_sparse_tensors_of_the_sdk_become_dense(array: np.ndarray) -> None:
    torch = pytest.importorskip("torch")
    for values in (torch.from_numpy(array), torch.from_numpy(array.astype(np.float32))):
        wire = types.TensorData.from_torch_sparse(values)
        fields = {"data": wire.data, "dtype": wire.dtype, "shape": wire.shape}
        if wire.sparse_crow_indices is not None:
            fields["sparse_crow_indices"] = wire.sparse_crow_indices
            fields["sparse_col_indices"] = wire.sparse_col_indices
        for tensor in (tensor_from_proto(proto(wire)), tensor_from_json(fields)):
            dense, width = tensor.as_rows(array.shape[0], MANY)
            assert width == array.shape[1]
            np.testing.assert_array_equal(dense.reshape(array.shape), array)


def test_a_missing_shape_means_one_dimension() -> None:
    wire = types.TensorData(data=[1, 2, 3], dtype="int64")
    values, width = tensor_from_proto(proto(wire)).as_rows(3, MANY)
    assert (values.tolist(), width) == ([1, 2, 3], 0)
    values, width = tensor_from_json({"data": [1, 2, 3], "dtype": "int64"}).as_rows(3, MANY)
    assert (values.tolist(), width) == ([1, 2, 3], 0)


def test_narrow_dtypes_are_widened() -> None:
    message = schema.ForwardBackwardRequest().data.add().loss_fn_inputs["x"]
    message.dtype, message.dense = schema.BFLOAT16, np.array([0x3F80, 0xC000], np.uint16).tobytes()
    assert tensor_from_proto(message).values.tolist() == [1.0, -2.0]
    message.dtype, message.dense = schema.INT32, np.array([5, -6], np.int32).tobytes()
    assert tensor_from_proto(message).values.tolist() == [5, -6]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"dtype": 1, "dense": b"abc"}, "3 bytes, which is not a multiple of 4"),
        ({"dtype": 0, "dense": b"abcd"}, "unknown dtype"),
        ({"dtype": 9, "dense": b"abcd"}, "unknown dtype"),
        ({"dtype": 1, "dense": b"", "shape": [-1]}, "shape"),
    ],
)
def test_wrong_protobuf_tensors_are_refused(fields: dict[str, Any], message: str) -> None:
    tensor = schema.ForwardBackwardRequest().data.add().loss_fn_inputs["x"]
    for name, value in fields.items():
        tensor.shape.extend(value) if name == "shape" else setattr(tensor, name, value)
    with pytest.raises(UserError, match=message):
        tensor_from_proto(tensor)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (3, "not a tensor object"),
        ({}, "dtype"),
        ({"dtype": "float64", "data": []}, "float64"),
        ({"dtype": "int64", "data": [1.5]}, "whole numbers"),
        ({"dtype": "int64", "data": ["1"]}, "whole numbers"),
        ({"dtype": "int64", "data": [2**63]}, "64 bits"),
        ({"dtype": "int64", "data": [2**70]}, "whole numbers"),
        ({"dtype": "int64", "data": [True]}, "whole numbers"),
        ({"dtype": "int64", "data": [1, True]}, "whole numbers"),
        ({"dtype": "float32", "data": [1.0, "1"]}, "numbers"),
        ({"dtype": "float32", "data": [None]}, "numbers"),
        ({"dtype": "float32", "data": [[1.0], [2.0]]}, "flat list"),
        ({"dtype": "float32", "data": [[1.0], 2.0]}, "flat list"),
        ({"dtype": "float32", "data": {"a": 1}}, "not a list"),
        ({"dtype": "float32", "data": [1.0], "shape": "x"}, "shape"),
        ({"dtype": "float32", "data": [1.0], "shape": [-1]}, "shape"),
        ({"dtype": "float32", "data": [1.0], "shape": [1, 1], "sparse_crow_indices": "x"}, "not a list"),
    ],
)
def test_wrong_json_tensors_are_refused(value: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        tensor_from_json(value)


def csr(**changes: Any) -> WireTensor:
    fields: dict[str, Any] = {
        "values": np.array([1.0, 2.0]),
        "shape": (2, 3),
        "crow": np.array([0, 1, 2]),
        "col": np.array([0, 2]),
    }
    return WireTensor(**(fields | changes))


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        (WireTensor(np.zeros(4), (4,)), "length 4, but model_input has 2 tokens"),
        (WireTensor(np.zeros(2), (2, 1, 1)), "3 dimensions"),
        (WireTensor(np.zeros(0), (2, 0)), "at least one column"),
        (WireTensor(np.zeros(3), (2, 2)), "3 values, but shape .* needs 4"),
        (csr(shape=(2, 10**7)), "20000000 elements when dense; at most 1000000"),
        (csr(shape=(2,)), "needs a shape"),
        (csr(shape=()), "needs a shape"),
        (csr(col=None), "needs a shape"),
        (csr(crow=np.array([0, 2])), "row pointers"),
        (csr(crow=np.array([], int)), "row pointers"),
        (csr(crow=np.array([1, 1, 2])), "row pointers"),
        (csr(crow=np.array([0, 1, 3])), "row pointers"),
        (csr(crow=np.array([0, 3, 2])), "row pointers"),
        (csr(crow=np.array([0, -1, 2])), "row pointers"),
        (csr(col=np.array([0, 3])), "outside 0..2"),
        (csr(col=np.array([-1, 2])), "outside 0..2"),
        (csr(values=np.zeros(3)), "2 column indices for 3 values"),
        (csr(crow=np.array([0, 2, 2]), col=np.array([1, 1])), "twice"),
    ],
)
def test_wrong_shapes_and_indices_are_refused(tensor: WireTensor, message: str) -> None:
    with pytest.raises(UserError, match=message):
        tensor.as_rows(2, MANY)


def test_row_pointers_whose_differences_wrap_around_are_refused() -> None:
    """Each difference modulo 2^64 is positive, and numpy would write far outside of its memory."""
    crow = np.array([0, 2**63 - 1, -2, 1])
    with np.errstate(over="ignore"):
        assert (np.diff(crow) >= 0).all()
    tensor = WireTensor(np.array([1]), (3, 2), crow, np.array([0]))
    with pytest.raises(UserError, match="row pointers"):
        tensor.as_rows(3, MANY)


def test_a_text_among_numbers_is_refused_before_it_takes_memory() -> None:
    values: list[Any] = ["a" * 10**6, *[0] * 10**4]
    tracemalloc.start()
    try:
        with pytest.raises(UserError, match="flat list"):
            tensor_from_json({"dtype": "int64", "data": values})
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 10**6  # numpy's array of texts would have 40 GB


def test_columns_may_come_in_any_order() -> None:
    values, _ = csr(crow=np.array([0, 2, 2]), col=np.array([2, 0])).as_rows(2, MANY)
    assert values.tolist() == [2.0, 0.0, 1.0, 0.0, 0.0, 0.0]


def test_text_chunks_are_joined() -> None:
    datum = schema.ForwardBackwardRequest().data.add()
    for part in ([1, 2], [], [3]):
        datum.model_input.add().encoded_text.tokens = np.array(part, np.int32).tobytes()
    assert text_tokens_from_proto(datum.model_input).tolist() == [1, 2, 3]
    chunks = [{"tokens": [1, 2]}, {"type": "encoded_text", "tokens": []}, {"tokens": [3]}]
    assert text_tokens_from_json({"chunks": chunks}).tolist() == [1, 2, 3]
    assert text_tokens_from_json({"chunks": []}).size == 0


@pytest.mark.parametrize(
    ("chunk", "message"),
    [
        ({"data": "aGk=", "format": "png"}, "chunks.1. is an image; only encoded text"),
        ({"location": "x", "format": "png"}, "is an image"),
        ({"dmel": "aGk="}, "is audio"),
        ({"novel": 1}, "not a known chunk"),
        (5, "not a known chunk"),
        ({"tokens": ["1"]}, "chunks.1..tokens is not a flat list"),
        ({"tokens": None}, "not a list"),
    ],
)
def test_what_is_not_text_is_refused(chunk: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        text_tokens_from_json({"chunks": [{"tokens": [1]}, chunk]})


def test_images_and_audio_are_refused_in_protobuf() -> None:
    datum = schema.ForwardBackwardRequest().data.add()
    datum.model_input.add().image.data = b"png"
    with pytest.raises(UserError, match=r"chunks\[0\] is an image"):
        text_tokens_from_proto(datum.model_input)
    datum.model_input[0].dmel.dmel = b"x"
    with pytest.raises(UserError, match="is audio"):
        text_tokens_from_proto(datum.model_input)


@pytest.mark.parametrize("count", [3, MANY])
def test_dimensions_are_counted_before_a_shape_is_shown(count: int) -> None:
    message = schema.ForwardBackwardRequest().data.add().loss_fn_inputs["x"]
    message.dtype = schema.INT64
    message.shape.extend([-1] * count)
    told = f"^has {count} dimensions; 1 or 2 are possible$"
    with pytest.raises(UserError, match=told):
        tensor_from_proto(message)
    with pytest.raises(UserError, match=told):
        tensor_from_json({"data": [1], "dtype": "int64", "shape": [1] * count})
    with pytest.raises(UserError, match="has a shape that is no list of whole numbers"):
        tensor_from_json({"data": [1], "dtype": "int64", "shape": [-1] * count})


@given(st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3), st.lists))
def test_any_json_is_numbers_or_refused(value: Any) -> None:
    for allow_float in (False, True):
        try:
            array = numbers(value, allow_float)
        except UserError:
            continue
        assert array.ndim == 1
        assert array.dtype.kind in "if"
