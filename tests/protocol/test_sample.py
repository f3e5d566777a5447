from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tinker import types

from twinkle_serve.protocol.bodies import parse_object
from twinkle_serve.protocol.errors import UserError
from twinkle_serve.protocol.sample import MAX_TARGET_CELLS, SampleLimits, decode_sample

LIMITS = SampleLimits(vocab_size=50, max_length=10, eos_token_ids=(2,), max_num_samples=8)
LONG = {"chunks": [{"tokens": [1] * 70_000}]}


def body(**fields: Any) -> dict[str, Any]:
    return {"prompt": {"chunks": [{"tokens": [1, 2, 3]}]}, **fields}


def test_the_smallest_request() -> None:
    request = decode_sample(body(sampling_params={}), LIMITS)
    assert request.prompt.tolist() == [1, 2, 3]
    assert request.prompt.dtype == np.int32
    assert (request.num_samples, request.prompt_logprobs) == (1, False)
    params = request.params
    assert (params.max_tokens, params.temperature, params.top_k, params.top_p) == (7, 1.0, -1, 1.0)
    assert (params.seed, params.stop_token_ids, params.stop_strings) == (None, (2,), ())


@pytest.mark.parametrize(("asked", "drawn"), [(None, 7), (5, 5), (7, 7), (8, 7), (10**6, 7)])
def test_what_is_drawn_has_room_behind_the_prompt(asked: int | None, drawn: int) -> None:
    """Whatever the model's context is: a tenant's own limit may be less."""
    assert decode_sample(body(sampling_params={"max_tokens": asked}), LIMITS).params.max_tokens == drawn


def test_what_is_too_long_is_not_looked_at() -> None:
    with pytest.raises(UserError, match="prompt has 70000 tokens; at most 10"):
        decode_sample({"prompt": {"chunks": [{"tokens": ["no token"] * 70_000}]}}, LIMITS)
    with pytest.raises(UserError, match="prompt has 11 chunks; at most 10"):
        decode_sample({"prompt": {"chunks": [{"tokens": []}] * 11}}, LIMITS)
    targets = {"dtype": "int64", "data": [None] * (MAX_TARGET_CELLS + 1)}
    with pytest.raises(UserError, match=r"target_prompt_logprobs has .* values; at most"):
        decode_sample(body(target_prompt_logprobs=targets), LIMITS)


def test_a_request_of_the_sdk() -> None:
    sent = types.SampleRequest(
        num_samples=4,
        prompt=types.ModelInput.from_ints([5, 6]),
        sampling_params=types.SamplingParams(max_tokens=7, seed=11, temperature=0.0, top_k=3, stop=[9]),
        sampling_session_id="s",
        seq_id=10**17,
        prompt_logprobs=True,
        topk_prompt_logprobs=2,
        topk_sample_logprobs=1,
        prompt_alt_tokens_k=2,
        prompt_logprobs_last_n=1,
    )
    request = decode_sample(sent.model_dump(mode="json", exclude_none=True), LIMITS)
    assert (request.num_samples, request.prompt_logprobs) == (4, True)
    assert (request.topk_prompt_logprobs, request.topk_sample_logprobs) == (2, 1)
    assert (request.prompt_alt_tokens_k, request.prompt_logprobs_last_n) == (2, 1)
    params = request.params
    assert (params.max_tokens, params.seed, params.temperature, params.top_k) == (7, 11, 0.0, 3)
    assert params.stop_token_ids == (9,)


def test_explicit_nulls_are_defaults() -> None:
    params = {"max_tokens": None, "stop": None, "seed": None, "temperature": None, "top_p": None}
    nulls = body(
        num_samples=None,
        prompt_logprobs=None,
        prompt_logprobs_last_n=None,
        target_prompt_logprobs=None,
        sampling_params=params,
    )
    plain, sent = decode_sample(body(), LIMITS), decode_sample(nulls, LIMITS)
    assert (plain.params, plain.num_samples) == (sent.params, sent.num_samples)
    assert decode_sample(body(sampling_params=None), LIMITS).params == plain.params


@given(st.integers() | st.integers(-(2**200), 2**200))
def test_any_seed_fits(seed: int) -> None:
    sent = json.dumps(body(sampling_params={"seed": seed})).encode()
    found = decode_sample(parse_object(sent), LIMITS).params.seed
    assert found is not None
    assert 0 <= found < 2**63


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"prompt": None}, "prompt has no list of chunks"),
        ({"prompt": {"chunks": []}}, "prompt is empty"),
        ({"prompt": {"chunks": [{"tokens": [1] * 11}]}}, "prompt has 11 tokens; at most 10"),
        ({"prompt": {"chunks": [{"tokens": [1, 50]}]}}, "prompt token 1 is 50, outside the vocabulary 0..49"),
        ({"prompt": {"chunks": [{"tokens": [-1]}]}}, "prompt token 0 is -1"),
        ({"prompt": {"chunks": [{"tokens": [1.5]}]}}, "prompt chunks.0..tokens is not a flat list"),
        ({"prompt": {"chunks": [{"data": "x", "format": "png"}]}}, "prompt chunks.0. is an image"),
        ({"prompt": {"chunks": [{"dmel": "x"}]}}, "audio"),
        ({"sampling_params": {"min_p": 0.2}}, "sampling_params: .*there is no .min_p.; there are max_tokens"),
        ({"num_samples": 0}, "num_samples is 0; 1 to 8"),
        ({"num_samples": 9}, "num_samples is 9; 1 to 8"),
        ({"num_samples": "many"}, "num_samples"),
        ({"topk_prompt_logprobs": -1}, "topk_prompt_logprobs is -1; 0 to 50"),
        ({"topk_sample_logprobs": 51}, "topk_sample_logprobs is 51; 0 to 50"),
        ({"prompt_alt_tokens_k": -2}, "prompt_alt_tokens_k"),
        ({"prompt_alt_tokens_k": 65}, "prompt_alt_tokens_k is 65; 0 to 64 are possible"),
        ({"prompt_logprobs_last_n": 3}, "prompt_logprobs_last_n is 3; 1 to 2"),
        ({"sampling_params": {"max_tokens": 0}}, "max_tokens is 0"),
        ({"sampling_params": {"temperature": -1}}, "temperature is -1"),
        ({"sampling_params": {"temperature": math.nan}}, "temperature is nan"),
        ({"sampling_params": {"top_p": 0}}, "top_p is 0"),
        ({"sampling_params": {"top_p": 1.1}}, "top_p is 1.1"),
        ({"sampling_params": {"top_k": "x"}}, "sampling_params.top_k"),
        ({"sampling_params": {"seed": 1.5}}, "sampling_params.seed"),
        ({"sampling_params": {"seed": "x"}}, "sampling_params.seed"),
        ({"sampling_params": {"stop": 5}}, "sampling_params.stop must be"),
        ({"sampling_params": {"stop": {"a": 1}}}, "sampling_params.stop must be"),
        ({"sampling_params": {"stop": ["a", 1]}}, "strings only, or token ids only"),
        ({"sampling_params": {"stop": [""]}}, "non-empty"),
        ({"sampling_params": {"stop": ""}}, "non-empty"),
        ({"sampling_params": {"stop": [50]}}, "sampling_params.stop is 50; 0 to 49"),
        ({"sampling_params": {"stop": [True]}}, "strings only, or token ids only"),
        ({"sampling_params": {"stop": ["a"] * 65}}, "up to 64"),
        (
            {"sampling_params": {"stop": ["a", "b" * 257]}},
            "sampling_params.stop has a string of 257 bytes; at most 256",
        ),
        ({"sampling_params": {"stop": "\u00e9" * 129}}, "a string of 258 bytes"),
        ({"sampling_params": 3}, "sampling_params"),
        ({"target_prompt_logprobs": {"data": [1], "dtype": "int64", "shape": [1, 1]}}, "length 1, but"),
        ({"target_prompt_logprobs": {"data": [1, 2], "dtype": "int64"}}, r"must have shape \[2, K\]"),
        ({"target_prompt_logprobs": {"data": [1, 50], "dtype": "int64", "shape": [2, 1]}}, "outside -1..49"),
        ({"target_prompt_logprobs": {"data": [1, -2], "dtype": "int64", "shape": [2, 1]}}, "outside -1..49"),
        (
            {"target_prompt_logprobs": {"data": [1.0, 2.0], "dtype": "float32", "shape": [2, 1]}},
            "must be int64",
        ),
    ],
)
def test_what_is_wrong_is_named(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        decode_sample(body(**fields), LIMITS)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"topk_sample_logprobs": 1024, "num_samples": 8, "sampling_params": {"max_tokens": 10000}},
            "topk_sample_logprobs is 1024 for up to 80000 tokens of all samples: 81920000",
        ),
        ({"topk_sample_logprobs": 1024, "num_samples": 8}, "up to 1048312 tokens"),
        ({"topk_prompt_logprobs": 1024, "prompt": LONG}, "at most 67108864"),
        ({"topk_prompt_logprobs": 1024, "prompt": LONG, "prompt_logprobs_last_n": 1}, "up to 70000 tokens"),
    ],
)
def test_all_alternatives_of_an_answer_have_a_limit(fields: dict[str, Any], message: str) -> None:
    limits = SampleLimits(vocab_size=2000, max_length=2**17 - 30, eos_token_ids=(2,), max_num_samples=8)
    with pytest.raises(UserError, match=message):
        decode_sample(body(**fields), limits)
    decode_sample(body(topk_sample_logprobs=1024, sampling_params={"max_tokens": 65536}), limits)


def test_draws_at_every_position_of_a_prompt_have_a_limit() -> None:
    limits = SampleLimits(vocab_size=151_936, max_length=32_768, eos_token_ids=(2,))
    long, longer = ({"chunks": [{"tokens": [1] * size}]} for size in (1024, 2048))
    for prompt, most in ((long, 64), (longer, 55)):
        request = {"prompt": prompt, "prompt_alt_tokens_k": most}
        assert decode_sample(request, limits).prompt_alt_tokens_k == most
    for k in (56, 64, 1024):
        with pytest.raises(UserError, match=f"prompt_alt_tokens_k is {k}"):
            decode_sample({"prompt": longer, "prompt_alt_tokens_k": k}, limits)
    # What is told of the other positions is told of fewer; alternatives are told of all.
    with pytest.raises(UserError, match=r"a prompt of 2048 tokens: .* at most 55 are possible"):
        decode_sample({"prompt": longer, "prompt_alt_tokens_k": 64, "prompt_logprobs_last_n": 1}, limits)


def test_a_prompt_may_fill_the_context() -> None:
    prompt = {"chunks": [{"tokens": [1] * 10}]}
    sample = decode_sample({"prompt": prompt}, LIMITS)
    assert sample.prompt.size == 10
    assert sample.params.max_tokens == 1


def test_stops_may_be_as_long_as_the_limit_and_are_counted() -> None:
    short = decode_sample(body(sampling_params={"stop": "a"}), LIMITS)
    long = decode_sample(body(sampling_params={"stop": ["b" * 256, "\u00e9" * 128]}), LIMITS)
    assert long.num_bytes - short.num_bytes == 511


def test_what_is_found_out_about_a_prompt_is_counted() -> None:
    plain = decode_sample(body(), LIMITS)
    for field in ("topk_prompt_logprobs", "prompt_alt_tokens_k"):
        asked = decode_sample(body(**{field: 5}), LIMITS)
        assert asked.num_bytes - plain.num_bytes == 8 * 5 * plain.prompt.size


def test_targets_dense_and_sparse() -> None:
    dense = {"data": [4, -1, 0, 5], "dtype": "int64", "shape": [2, 2]}
    request = decode_sample(body(target_prompt_logprobs=dense), LIMITS)
    assert request.target_prompt_tokens is not None
    assert request.target_prompt_tokens.tolist() == [[4, -1], [0, 5]]
    assert request.target_cells is None
    sparse = {
        "data": [4, 0],
        "dtype": "int64",
        "shape": [2, 2],
        "sparse_crow_indices": [0, 1, 2],
        "sparse_col_indices": [0, 1],
    }
    listed = decode_sample(body(target_prompt_logprobs=sparse), LIMITS)
    assert listed.target_prompt_tokens is not None
    assert listed.target_prompt_tokens.tolist() == [[4, -1], [-1, 0]]
    assert listed.target_cells is not None
    assert (listed.target_cells.starts.tolist(), listed.target_cells.columns.tolist()) == ([0, 1, 2], [0, 1])
    assert listed.num_bytes - request.num_bytes == 8 * (3 + 2)


def test_a_small_sparse_tensor_cannot_become_a_large_one() -> None:
    limits = SampleLimits(vocab_size=50, max_length=2**18, eos_token_ids=(2,))
    prompt = {"chunks": [{"tokens": [1] * (2**16 + 1)}]}

    def sparse(width: int) -> dict[str, Any]:
        crow = [0] * (2**16 + 1)
        return {
            "data": [],
            "dtype": "int64",
            "shape": [2**16, width],
            "sparse_crow_indices": crow,
            "sparse_col_indices": [],
        }

    decode_sample({"prompt": prompt, "target_prompt_logprobs": sparse(256)}, limits)
    message = r"target_prompt_logprobs has shape \[65536, 257\]; at most 16777216 cells are possible"
    with pytest.raises(UserError, match=message):
        decode_sample({"prompt": prompt, "target_prompt_logprobs": sparse(257)}, limits)


def test_a_single_token_has_no_targets() -> None:
    request = {
        "prompt": {"chunks": [{"tokens": [1]}]},
        "target_prompt_logprobs": {"data": [], "dtype": "int64"},
    }
    with pytest.raises(UserError, match="at least two tokens"):
        decode_sample(request, LIMITS)
