"""forward_backward bodies, as each SDK writes them, to a checked batch or an error that names the field."""

from __future__ import annotations

import json
import math
import tracemalloc
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tinker import types

from tests.protocol import sdk_bodies as sdk
from twinkle_serve.protocol import schema
from twinkle_serve.protocol.batch import MAX_WIDTH, DatumLimits, dense_room
from twinkle_serve.protocol.data import DatumBatch
from twinkle_serve.protocol.errors import MalformedBody, UserError
from twinkle_serve.protocol.forward import CheckedPass, address, check_pass, parse_json, parse_proto
from twinkle_serve.protocol.losses import LossSpec

VOCAB = 50
LIMITS = DatumLimits(vocab_size=VOCAB, max_length=12, max_datums=20, max_elements=10_000)
token_lists = st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=12)
floats = st.floats(-(2.0**99), 2.0**99, width=32)


def proto(*data: types.Datum, loss_fn: str = "cross_entropy", **config: Any) -> CheckedPass:
    return check_pass(parse_proto(sdk.forward_proto(data, loss_fn=loss_fn, config=config)), LIMITS)


def column(batch: DatumBatch, name: str, index: int) -> np.ndarray:
    one = batch.select([index])
    width = int(one.columns[name].widths[0])
    return one.columns[name].values.reshape(-1, width) if width else one.columns[name].values


@st.composite
def weighted_datums(draw: st.DrawFn) -> list[tuple[list[int], list[int], list[float]]]:
    datums = []
    for tokens in draw(st.lists(token_lists, min_size=1, max_size=5)):
        size = len(tokens)
        targets = draw(st.lists(st.integers(0, VOCAB - 1), min_size=size, max_size=size))
        datums.append((tokens, targets, draw(st.lists(floats, min_size=size, max_size=size))))
    return datums


@settings(max_examples=50)
@given(weighted_datums())
def test_protobuf_and_json_give_the_same_batch(
    datums: list[tuple[list[int], list[int], list[float]]],
) -> None:
    data = [sdk.datum(tokens, target_tokens=targets, weights=weights) for tokens, targets, weights in datums]
    by_proto = proto(*data)
    items = [
        {
            "model_input": {"chunks": [{"tokens": tokens[:1]}, {"tokens": tokens[1:]}]},
            "loss_fn_inputs": {
                "target_tokens": {"data": targets, "dtype": "int64", "shape": None},
                "weights": {"data": weights, "dtype": "float32", "shape": [len(weights)]},
            },
        }
        for tokens, targets, weights in datums
    ]
    by_json = check_pass(parse_json(sdk.forward_json(items), forward_only=False), LIMITS)
    assert by_proto.batch.pack() == by_json.batch.pack()
    for index, (tokens, targets, weights) in enumerate(datums):
        assert by_proto.batch.select([index]).tokens.tolist() == tokens
        assert column(by_proto.batch, "target_tokens", index).tolist() == targets
        np.testing.assert_array_equal(column(by_proto.batch, "weights", index), np.float32(weights))


def test_the_envelope() -> None:
    body = sdk.forward_proto([sdk.cross_entropy()], seq_id=7, forward_only=True, model_id="m")
    envelope = parse_proto(body)
    assert (envelope.model_id, envelope.seq_id, envelope.forward_only) == ("m", 7, True)
    assert not check_pass(envelope, LIMITS).backward
    assert parse_proto(sdk.forward_proto([sdk.cross_entropy()], seq_id=None)).seq_id is None
    envelope = parse_json({"model_id": "m", "seq_id": 2, "forward_input": {"data": []}}, forward_only=True)
    assert (envelope.model_id, envelope.seq_id, envelope.forward_only) == ("m", 2, True)


def test_only_the_columns_of_the_loss_are_kept() -> None:
    data = sdk.datum(
        [1, 2],
        target_tokens=[1, 2],
        weights=[1.0, 1.0],
        logprobs=[-1.0, -2.0],
        advantages=[0.5, 0.5],
        mask=types.TensorData(data=[1.0], dtype="float32"),
    )
    assert set(proto(data).batch.columns) == {"target_tokens", "weights"}
    assert set(proto(data, loss_fn="ppo").batch.columns) == {"target_tokens", "logprobs", "advantages"}


def test_missing_weights_count_as_one() -> None:
    two = types.TensorData(data=np.array([[1, 2], [3, 4]]), dtype="int64", shape=[2, 2])
    checked = proto(
        sdk.datum([1, 2, 3], target_tokens=[1, 2, 3]),
        sdk.datum([1, 2], target_tokens=[1, 2], weights=[0.0, 5.0]),
        sdk.datum([1, 2], target_tokens=two),
    )
    assert column(checked.batch, "weights", 0).tolist() == [1.0, 1.0, 1.0]
    assert column(checked.batch, "weights", 1).tolist() == [0.0, 5.0]
    assert column(checked.batch, "weights", 2).tolist() == [[1.0, 1.0], [1.0, 1.0]]
    assert checked.batch.columns["weights"].widths.tolist() == [0, 0, 2]


def test_integers_are_fine_as_weights() -> None:
    weights = types.TensorData(data=[1, 0], dtype="int64", shape=[2])
    batch = proto(sdk.datum([1, 2], target_tokens=[1, 2], weights=weights)).batch
    assert batch.columns["weights"].values.dtype == np.float32


def policy(**more: Any) -> types.Datum:
    given = {"target_tokens": [1, 2], "logprobs": [-1.0, -2.0], "advantages": [0.5, -0.5]}
    return sdk.datum([1, 2], **(given | more))


def test_thresholds_by_position_are_completed_from_the_config() -> None:
    checked = proto(policy(clip_low_threshold=[0.1, 0.2]), policy(), loss_fn="ppo", clip_low_threshold=0.3)
    assert column(checked.batch, "clip_low_threshold", 0).tolist() == pytest.approx([0.1, 0.2])
    assert column(checked.batch, "clip_low_threshold", 1).tolist() == pytest.approx([0.3, 0.3])
    assert "clip_high_threshold" not in checked.batch.columns
    assert checked.loss_config == {"clip_low_threshold": 0.3, "clip_high_threshold": 1.2}


def test_the_ratio_mask_of_gspo_is_one_where_absent() -> None:
    checked = proto(policy(), policy(sequence_ratio_mask=[0.0, 1.0]), loss_fn="gspo")
    assert checked.batch.columns["sequence_ratio_mask"].values.tolist() == [1.0, 1.0, 0.0, 1.0]


def test_the_second_config_map_wins() -> None:
    from tinker.proto import tinker_public_pb2

    message = tinker_public_pb2.ForwardBackwardRequest()
    message.ParseFromString(sdk.forward_proto([policy()], loss_fn="dro", config={"beta": 0.25}))
    assert check_pass(parse_proto(message.SerializeToString()), LIMITS).loss_config == {"beta": 0.25}
    message.ClearField("loss_fn_config_v2")
    message.loss_fn_config["beta"] = 0.75
    assert check_pass(parse_proto(message.SerializeToString()), LIMITS).loss_config == {"beta": 0.75}
    message.loss_fn_config_v2["beta"].text = "much"
    with pytest.raises(UserError, match=r"beta.*finite number"):
        check_pass(parse_proto(message.SerializeToString()), LIMITS)


def targets(*ids: int) -> types.Datum:
    return sdk.datum([1] * len(ids), target_tokens=list(ids))


FLOATS = types.TensorData(data=[1.0], dtype="float32")


@pytest.mark.parametrize(
    ("data", "loss_fn", "message"),
    [
        ([], "cross_entropy", "data is empty"),
        ([targets(1)] * 21, "cross_entropy", "21 datums; at most 20"),
        ([targets(1), sdk.datum([], target_tokens=[])], "cross_entropy", r"data\[1\].model_input is empty"),
        (
            [targets(1), targets(*[1] * 13)],
            "cross_entropy",
            r"data\[1\].model_input has 13 tokens; at most 12",
        ),
        (
            [targets(1), sdk.datum([1, VOCAB], target_tokens=[1, 1])],
            "cross_entropy",
            r"data\[1\].model_input token 1 is 50, outside the vocabulary",
        ),
        ([sdk.datum([-1], target_tokens=[1])], "cross_entropy", r"token 0 is -1"),
        (
            [targets(1, 2), targets(3, VOCAB)],
            "cross_entropy",
            r"data\[1\].loss_fn_inputs.target_tokens\[1\] is 50, outside",
        ),
        ([targets(-100)], "cross_entropy", r"target_tokens\[0\] is -100"),
        ([targets(1), targets(-1)], "cross_entropy", r"data\[1\].loss_fn_inputs.target_tokens\[0\] is -1"),
        (
            [sdk.datum([1, 2])],
            "cross_entropy",
            r"data\[0\].loss_fn_inputs.target_tokens is missing; cross_entropy needs target_tokens",
        ),
        (
            [sdk.datum([1, 2], target_tokens=[1])],
            "cross_entropy",
            r"target_tokens has length 1, but model_input has 2 tokens",
        ),
        (
            [targets(1, 2), sdk.datum([1, 2], target_tokens=[1, 2], weights=[1.0, math.nan])],
            "cross_entropy",
            r"data\[1\].loss_fn_inputs.weights\[1\] is nan, not a finite",
        ),
        ([sdk.datum([1], target_tokens=[1], weights=[math.inf])], "cross_entropy", r"weights\[0\] is inf"),
        ([sdk.datum([1, 2], target_tokens=[1, 2], weights=[1.0])], "cross_entropy", r"weights has length 1"),
        ([sdk.datum([1], target_tokens=FLOATS)], "cross_entropy", "target_tokens must be int64"),
        (
            [targets(1)],
            "ppo",
            r"data\[0\].loss_fn_inputs.logprobs is missing; ppo needs target_tokens, logprobs, adv",
        ),
        (
            [policy(), policy(logprobs=[-1.0, math.nan])],
            "ppo",
            r"data\[1\].loss_fn_inputs.logprobs\[1\] is nan",
        ),
        ([policy(advantages=[1.0])], "gspo", "advantages has length 1"),
        ([targets(1)], "custom", "loss_fn 'custom' is not served; served are cross_entropy"),
        ([targets(1)], "stable_reinforce", "no public formula"),
    ],
)
def test_what_is_wrong_is_named(data: list[types.Datum], loss_fn: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        proto(*data, loss_fn=loss_fn)


def test_many_targets_are_for_cross_entropy_only() -> None:
    two = types.TensorData(data=np.array([[1, 2], [3, 4]]), dtype="int64", shape=[2, 2])
    ones = types.TensorData(data=np.ones((2, 2)), dtype="float32", shape=[2, 2])
    batch = proto(sdk.datum([1, 2], target_tokens=two, weights=ones)).batch
    assert column(batch, "target_tokens", 0).tolist() == [[1, 2], [3, 4]]
    with pytest.raises(UserError, match=r"target_tokens is \[N, 2\], but ppo takes \[N\]"):
        proto(policy(target_tokens=two), loss_fn="ppo")
    with pytest.raises(UserError, match=r"weights is \[N\], but target_tokens is \[N, 2\]"):
        proto(sdk.datum([1, 2], target_tokens=two, weights=[1.0, 1.0]))


def test_a_small_body_cannot_become_a_huge_batch() -> None:
    """CSR tensors that are each just below the limit."""
    sparse = {"sparse_crow_indices": [0, 1], "sparse_col_indices": [0]}
    wide = types.TensorData(data=[1], dtype="int64", shape=[1, 3_000], **sparse)
    limits = replace(LIMITS, vocab_size=3_000)
    envelope = parse_proto(sdk.forward_proto([sdk.datum([1], target_tokens=wide)] * 5))
    with pytest.raises(
        UserError, match=r"data\[3\].loss_fn_inputs.target_tokens has 3000 elements when dense"
    ):
        check_pass(envelope, limits)


@pytest.mark.parametrize(("vocab", "most"), [(100, 100), (10**5, MAX_WIDTH)])
def test_rows_have_no_more_targets_than_tokens_exist_or_are_of_use(vocab: int, most: int) -> None:
    limits = replace(LIMITS, vocab_size=vocab)
    for width in (most, most + 1):
        wide = types.TensorData(data=np.ones((1, width), np.int64), dtype="int64", shape=[1, width])
        envelope = parse_proto(sdk.forward_proto([sdk.datum([1], target_tokens=wide)]))
        if width == most:
            assert check_pass(envelope, limits).batch.columns["target_tokens"].widths.tolist() == [most]
            continue
        message = rf"target_tokens is \[N, {width}\]; \[N, K\] is possible with K up to {most}"
        with pytest.raises(UserError, match=message):
            check_pass(envelope, limits)


def topk(num_tokens: int, width: int, num_graded: int) -> types.Datum:
    """As distillation has it: the likeliest tokens where an answer is, and nothing where its prompt is."""
    ids, weights = np.zeros((num_tokens, width), np.int64), np.zeros((num_tokens, width), np.float32)
    ids[num_tokens - num_graded :], weights[num_tokens - num_graded :] = np.arange(1, width + 1), 1 / width
    tensors = (torch.from_numpy(array) for array in (ids, weights))
    targets, shares = (types.TensorData.from_torch_sparse(tensor) for tensor in tensors)
    return sdk.datum([1] * num_tokens, target_tokens=targets, weights=shares)


@pytest.mark.parametrize(
    ("num_tokens", "width", "num_graded", "num_datums"),
    [
        (400, 1024, 400, 1),
        (400, 1024, 200, 4),
        (1024, 1024, 1, 1),
        (8192, 1024, 30, 1),
        (8192, 192, 0, 2),
        (2048, 20, 100, 64),
        (32_768, 20, 8, 2),
    ],
)
def test_a_body_has_room_for_what_distillation_sends(
    num_tokens: int, width: int, num_graded: int, num_datums: int
) -> None:
    body = sdk.forward_proto([topk(num_tokens, width, num_graded)] * num_datums)
    limits = DatumLimits(100_000, 32_768, max_elements=dense_room(len(body)))
    batch = check_pass(parse_proto(body), limits).batch
    assert batch.columns["target_tokens"].values.size == num_tokens * width * num_datums


def test_a_body_has_no_room_for_what_is_hundreds_of_times_as_large() -> None:
    body = sdk.forward_proto([topk(4096, 1024, 0)])
    assert len(body) < 100_000
    limits = DatumLimits(100_000, 32_768, max_elements=dense_room(len(body)))
    message = (
        r"data\[0\].loss_fn_inputs.target_tokens has 4194304 elements when dense; at most 23\d+ fit a req"
    )
    with pytest.raises(UserError, match=message):
        check_pass(parse_proto(body), limits)


def empty(what: str, number: int) -> bytes:
    """A body of so many empty submessages."""
    if what == "datums":
        return sdk.forward_proto([]) + b"\x1a\x00" * number
    request = schema.ForwardBackwardRequest.FromString(sdk.forward_proto([]))
    request.data.add().MergeFromString(b"\x0a\x02\x0a\x00" * number)
    body: bytes = request.SerializeToString()
    return body


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("datums", "data has 300000 datums; at most 20 fit one request"),
        ("chunks", r"data\[0\].model_input has 300000 chunks; at most 12 are possible"),
    ],
)
def test_no_object_is_made_for_what_is_too_many(what: str, message: str) -> None:
    body = empty(what, 300_000)
    tracemalloc.start()
    try:
        with pytest.raises(UserError, match=message):
            check_pass(parse_proto(body), LIMITS)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 10**6  # an object each has 20 MB


def test_a_chunk_may_be_as_small_as_a_token() -> None:
    model_input = types.ModelInput.empty()
    for _ in range(LIMITS.max_length):
        model_input = model_input.append_int(1)
    targets = types.TensorData(data=[1] * LIMITS.max_length, dtype="int64", shape=[LIMITS.max_length])
    batch = proto(types.Datum(model_input=model_input, loss_fn_inputs={"target_tokens": targets})).batch
    assert batch.lengths.tolist() == [LIMITS.max_length]
    chunks = {"chunks": [{"tokens": []}] * (LIMITS.max_length + 1)}
    body = sdk.forward_json([{"model_input": chunks, "loss_fn_inputs": {}}])
    with pytest.raises(UserError, match="has 13 chunks; at most 12 are possible"):
        check_pass(parse_json(body, forward_only=False), LIMITS)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({}, "model_id is missing"),
        ({"model_id": ""}, "model_id is missing"),
        ({"model_id": 3, "seq_id": 1}, "model_id is missing"),
        ({"model_id": "m", "seq_id": "1"}, "seq_id must be"),
        ({"model_id": "m", "seq_id": -1}, "seq_id must be"),
        ({"model_id": "m", "seq_id": True}, "seq_id must be"),
        (
            {"model_id": "m", "seq_id": 2**31},
            "seq_id must be a whole number from 0 to 2147483647, got 2147483648",
        ),
        ({"model_id": "m", "seq_id": 2**63}, "seq_id must be"),
        ({"model_id": "m", "seq_id": 1.0}, "seq_id must be"),
    ],
)
def test_a_body_without_an_address_is_malformed(body: dict[str, Any], message: str) -> None:
    with pytest.raises(MalformedBody, match=message):
        address(body)


def test_a_seq_id_below_zero_is_malformed_in_protobuf_too() -> None:
    request = schema.ForwardBackwardRequest(model_id="m", seq_id=-1)
    with pytest.raises(MalformedBody, match="seq_id must be a whole number"):
        parse_proto(request.SerializeToString())


def test_a_seq_id_of_any_size_is_told_short() -> None:
    for value, told in (([0] * 10**6, "a list"), ({str(key): 0 for key in range(1000)}, "an object")):
        with pytest.raises(MalformedBody, match=f"got {told}$"):
            address({"model_id": "m", "seq_id": value})


def test_seq_ids_may_be_absent() -> None:
    assert address({"model_id": "m"}) == address({"model_id": "m", "seq_id": None}) == ("m", None)


@pytest.mark.parametrize("body", [b"", b"\x0a\xff", b"{}", b"\xff" * 20])
def test_what_is_no_message_is_malformed(body: bytes) -> None:
    with pytest.raises(MalformedBody):
        parse_proto(body)


ONE = {"chunks": [{"tokens": [1]}]}


def given_datum(datum: Any) -> dict[str, Any]:
    return {"loss_fn": "cross_entropy", "data": [datum]}


@pytest.mark.parametrize(
    ("inner", "message"),
    [
        (None, "loss_fn None is not served"),
        ({"loss_fn": "cross_entropy"}, "data is not a list"),
        ({"loss_fn": "cross_entropy", "data": {}}, "data is not a list"),
        (given_datum(1), r"data\[0\].model_input has no list of chunks"),
        (given_datum({"model_input": {"chunks": []}}), r"data\[0\].model_input is empty"),
        (given_datum({"model_input": {"chunks": [{"tokens": [2**40]}]}}), "outside the vocabulary"),
        (given_datum({"model_input": ONE, "loss_fn_inputs": 4}), "target_tokens is missing"),
        (given_datum({"model_input": ONE, "loss_fn_inputs": {"target_tokens": 4}}), "not a tensor object"),
        ({"loss_fn": "cross_entropy", "data": [], "loss_fn_config": [1]}, "unknown to cross_entropy"),
    ],
)
def test_wrong_json_is_named(inner: Any, message: str) -> None:
    body = {"model_id": "m", "seq_id": 1, "forward_backward_input": inner}
    with pytest.raises(UserError, match=message):
        check_pass(parse_json(body, forward_only=False), LIMITS)


def test_nan_in_json_is_named() -> None:
    body = json.loads(json.dumps(sdk.forward_json([sdk.json_datum([1, 2], [1.0, math.nan])])))
    with pytest.raises(UserError, match=r"weights\[1\] is nan"):
        check_pass(parse_json(body, forward_only=False), LIMITS)


@given(st.binary(max_size=300))
def test_any_bytes_are_checked_or_refused(body: bytes) -> None:
    try:
        check_pass(parse_proto(body), LIMITS)
    except (MalformedBody, UserError):
        return


@settings(max_examples=200)
@given(st.data())
def test_a_damaged_message_is_checked_or_refused(data: st.DataObject) -> None:
    body = bytearray(sdk.forward_proto([sdk.cross_entropy(), policy()], loss_fn="cross_entropy"))
    for _ in range(data.draw(st.integers(1, 3))):
        body[data.draw(st.integers(0, len(body) - 1))] = data.draw(st.integers(0, 255))
    try:
        check_pass(parse_proto(bytes(body)), LIMITS)
    except (MalformedBody, UserError):
        return


def test_an_optional_input_without_a_default_is_in_all_datums_or_in_none() -> None:
    loss = LossSpec("m", ("target_tokens",), ("mask",))
    tensor = {"data": [1], "dtype": "int64"}
    plain = {"model_input": {"chunks": [{"tokens": [1]}]}, "loss_fn_inputs": {"target_tokens": tensor}}
    mask = {"data": [1.0], "dtype": "float32"}
    masked = plain | {"loss_fn_inputs": {"target_tokens": tensor, "mask": mask}}
    body = {"model_id": "m", "forward_backward_input": {"loss_fn": "m", "data": [masked, plain]}}
    with pytest.raises(UserError, match=r"data\[1\].loss_fn_inputs.mask is missing, but data\[0\] has it"):
        check_pass(parse_json(body, forward_only=False), LIMITS, {"m": loss})
