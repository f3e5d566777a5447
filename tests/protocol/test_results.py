"""Our results through the SDK's own decoders."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from tinker import types
from tinker.lib.public_interfaces.sampling_client import _tensor_data_to_model
from tinker.proto.response_conv import deserialize_forward_backward_output, deserialize_sample_response

from twinkle_serve.protocol import results
from twinkle_serve.protocol.data import Column, ForwardResult, SampledSequence, SampleResult, TopK
from twinkle_serve.protocol.errors import UserError
from twinkle_serve.protocol.results import (
    JSON,
    PROTOBUF,
    dump,
    encode_result,
    forward_json,
    num_cells,
    object_json,
    sample_json,
    sample_proto,
)
from twinkle_serve.protocol.sample import SampleLimits, decode_sample

NAN = math.nan


def forward_result(shapes: list[tuple[int, int]], metrics: dict[str, float] | None = None) -> ForwardResult:
    """Datums of (length, width), whose logprobs count -0, -1, -2, ... through all of them."""
    lengths = np.array([length for length, _ in shapes], np.int64)
    widths = np.array([width for _, width in shapes], np.int32)
    total = int((lengths * np.maximum(1, widths)).sum())
    return ForwardResult(
        Column(-np.arange(total, dtype=np.float32), widths), lengths, metrics or {"loss:sum": 1.5}
    )


@settings(max_examples=100)
@given(st.lists(st.tuples(st.integers(1, 5), st.sampled_from([0, 0, 1, 2, 3])), min_size=1, max_size=8))
def test_forward_results_reach_the_sdk_whole(shapes: list[tuple[int, int]]) -> None:
    result = forward_result(shapes)
    body, media_type = encode_result(result, PROTOBUF)
    assert media_type == PROTOBUF
    output = deserialize_forward_backward_output(body)
    assert output.metrics == {"loss:sum": 1.5}
    assert output.loss_fn_output_type == "TorchLossReturn"
    by_json = json.loads(encode_result(result, JSON)[0])["loss_fn_outputs"]
    assert len(output.loss_fn_outputs) == len(by_json) == len(shapes)
    start = 0
    for (length, width), found, old in zip(shapes, output.loss_fn_outputs, by_json, strict=True):
        size = length * max(1, width)
        expected = [-float(x) for x in range(start, start + size)]
        shape = [length, width] if width else [length]
        assert found["logprobs"].shape == old["logprobs"]["shape"] == shape
        assert found["logprobs"].data == old["logprobs"]["data"] == expected
        assert set(old["logprobs"]) == {"data", "dtype", "shape"}
        start += size


def test_one_record_for_equal_widths() -> None:
    from twinkle_serve.protocol.schema import ForwardBackwardOutput

    message = ForwardBackwardOutput()
    message.ParseFromString(encode_result(forward_result([(2, 0), (3, 0), (1, 2), (1, 0)]), PROTOBUF)[0])
    assert [record.num_datums for record in message.loss_fn_outputs] == [2, 1, 1]


def test_metrics_in_json_are_finite_and_in_protobuf_whole() -> None:
    result = forward_result([(1, 0)], {"loss:sum": 1.0, "x:mean": NAN})
    assert forward_json(result)["metrics"] == {"loss:sum": 1.0}
    assert math.isnan(
        deserialize_forward_backward_output(encode_result(result, PROTOBUF)[0]).metrics["x:mean"]
    )


@st.composite
def sample_results(draw: st.DrawFn) -> SampleResult:
    def floats(*shape: int) -> Any:
        return draw(hnp.arrays(np.float32, shape, elements=st.floats(-50, 0, width=32)))

    def top(rows: int) -> TopK:
        k = draw(st.integers(1, 3))
        ids = draw(hnp.arrays(np.int32, (rows, k), elements=st.integers(0, 99)))
        return TopK(ids, floats(rows, k))

    sequences = []
    for _ in range(draw(st.integers(1, 3))):
        size = draw(st.integers(1, 4))
        tokens = draw(hnp.arrays(np.int32, size, elements=st.integers(0, 99)))
        reason = draw(st.sampled_from(["stop", "length"]))
        sequences.append(SampledSequence(tokens, floats(size), reason, draw(st.none() | st.just(top(size)))))
    rows = draw(st.integers(2, 5))
    prompt_logprobs = floats(rows)
    prompt_logprobs[0] = NAN
    return SampleResult(
        tuple(sequences),
        prompt_logprobs=draw(st.none() | st.just(prompt_logprobs)),
        topk_prompt=draw(st.none() | st.just(top(rows))),
        target_prompt_logprobs=draw(st.none() | st.just(floats(rows - 1, 2))),
        prompt_alternatives=draw(st.none() | st.just(top(rows - 1))),
        prompt_cache_hit_tokens=draw(st.integers(0, 9)),
    )


@settings(max_examples=100)
@given(sample_results())
def test_samples_reach_the_sdk_whole(result: SampleResult) -> None:
    found = deserialize_sample_response(sample_proto(result))
    for ours, theirs in zip(result.sequences, found.sequences, strict=True):
        assert theirs.stop_reason == ours.stop_reason
        assert theirs.tokens == ours.tokens.tolist()
        np.testing.assert_array_equal(theirs.logprobs_np, ours.logprobs)
        same_topk(theirs.topk_logprobs_np, ours.topk)
    if result.prompt_logprobs is None:
        assert found.prompt_logprobs is None
    else:
        np.testing.assert_array_equal(found.prompt_logprobs_np, result.prompt_logprobs)
    same_topk(found.topk_prompt_logprobs_np, result.topk_prompt)
    if result.target_prompt_logprobs is not None:
        np.testing.assert_array_equal(found.target_prompt_logprobs.to_numpy(), result.target_prompt_logprobs)
    if result.prompt_alternatives is not None:
        alternatives = found.prompt_alt_tokens
        np.testing.assert_array_equal(alternatives.tokens.to_numpy(), result.prompt_alternatives.token_ids)
        np.testing.assert_array_equal(alternatives.logprobs.to_numpy(), result.prompt_alternatives.logprobs)
    assert found.prompt_cache_hit_tokens == result.prompt_cache_hit_tokens
    json.loads(encode_result(result, JSON)[0])


@pytest.mark.parametrize("sparse", [False, True])
def test_targets_come_back_in_the_layout_they_were_sent_in(sparse: bool) -> None:
    ids = torch.tensor([[-1, -1, -1], [7, -1, 9], [-1, -1, -1], [-1, 3, -1]])
    sent = (
        types.TensorData.from_torch_sparse(ids, pad_value=-1) if sparse else types.TensorData.from_torch(ids)
    )
    body = {
        "prompt": {"chunks": [{"tokens": [1, 2, 3, 4, 5]}]},
        "target_prompt_logprobs": _tensor_data_to_model(sent).model_dump(exclude_none=True),
    }
    request = decode_sample(body, SampleLimits(100, 100, (2,)))
    logprobs = np.array([[0, 0, 0], [-1, 0, -2], [0, 0, 0], [0, -3, 0]], np.float32)
    sequence = SampledSequence(np.array([1], np.int32), np.array([-1.0], np.float32), "stop")
    result = SampleResult((sequence,), target_prompt_logprobs=logprobs, target_cells=request.target_cells)
    found = deserialize_sample_response(sample_proto(result)).target_prompt_logprobs
    assert found.dtype == "float32"
    assert (found.sparse_crow_indices, found.sparse_col_indices, found.shape) == (
        sent.sparse_crow_indices,
        sent.sparse_col_indices,
        sent.shape,
    )
    np.testing.assert_array_equal(found.to_torch().numpy(), logprobs)
    if sparse:
        unnamed = np.where(ids.numpy() < 0, -1000, logprobs)
        np.testing.assert_array_equal(found.to_torch(pad_value=-1000).numpy(), unnamed)


def same_topk(theirs: Any, ours: TopK | None) -> None:
    if ours is None:
        assert theirs is None
        return
    np.testing.assert_array_equal(theirs.token_ids, ours.token_ids)
    np.testing.assert_array_equal(theirs.logprobs, ours.logprobs)


def test_samples_in_json() -> None:
    sequence = SampledSequence(np.array([1, 2], np.int32), np.array([-0.5, -math.inf], np.float32), "length")
    empty, full = (0, -99999.0), (4, -1.0)
    top = TopK(
        np.array([[0, 0], [4, 0]], np.int32),
        np.array([[empty[1], empty[1]], [full[1], empty[1]]], np.float32),
    )
    result = SampleResult((sequence,), np.array([NAN, -1.0], np.float32), top)
    assert json.loads(dump(sample_json(result))) == {
        "type": "sample",
        "sequences": [{"stop_reason": "length", "tokens": [1, 2], "logprobs": [-0.5, -99999.0]}],
        "prompt_logprobs": [None, -1.0],
        "topk_prompt_logprobs": [None, [[4, -1.0]]],
    }
    assert "prompt_logprobs" not in sample_json(SampleResult((sequence,)))


def test_a_result_that_json_cannot_tell_is_told_in_protobuf(monkeypatch: pytest.MonkeyPatch) -> None:
    top = TopK(np.ones((3, 4), np.int32), np.zeros((3, 4), np.float32))
    sequence = SampledSequence(np.array([1], np.int32), np.zeros(1, np.float32), "stop")
    result = SampleResult((sequence,), np.zeros(3, np.float32), top)
    for value, cells in ((result, 16), (forward_result([(5, 0), (2, 3)]), 11), ({"a": 1.0}, 0)):
        assert num_cells(value) == cells
        monkeypatch.setattr(results, "MAX_JSON_CELLS", cells)
        assert encode_result(value, "")[1] == JSON
        monkeypatch.setattr(results, "MAX_JSON_CELLS", cells - 1)
        if cells:
            with pytest.raises(UserError, match=f"has {cells} numbers; as JSON at most {cells - 1}"):
                encode_result(value, "")
            assert encode_result(value, PROTOBUF)[1] == PROTOBUF


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (None, {}),
        ({}, {}),
        ({"model_id": "m"}, {"model_id": "m"}),
        ({"path": "p", "size_bytes": 5}, {"path": "p", "size_bytes": 5}),
        ({"sampling_session_id": "s", "path": None}, {"sampling_session_id": "s"}),
        ({"grad_norm": 1.0, "bad": NAN}, {"metrics": {"grad_norm": 1.0}}),
        ({"metrics": {"grad_norm": math.inf, "a": 1}}, {"metrics": {"a": 1}}),
        ({"bad": NAN}, {"metrics": {}}),
        ({"path": "p", "error": None}, {"path": "p"}),
    ],
)
def test_plain_results(value: Any, expected: Any) -> None:
    assert object_json(value or {}) == expected
    body, media_type = encode_result(value, PROTOBUF)
    assert (json.loads(body), media_type) == (expected, JSON)
