"""An ``asample`` body to one checked SampleRequest.

Knows fields, defaults and ranges. Does not know samplers, nor what stops a sample when the client does not
say: the caller passes the model's end-of-sequence ids.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
from pydantic import Field

from twinkle_serve.protocol.batch import check_token_range
from twinkle_serve.protocol.data import Listed, SampleRequest, SamplingParams
from twinkle_serve.protocol.errors import UserError
from twinkle_serve.protocol.requests import Counter, Exact, Lenient, Metadata, Seed, read
from twinkle_serve.protocol.tensors import tensor_from_json, text_tokens_from_json

MAX_STOPS = 64
MAX_STOP_BYTES = 256
"""Of one string, as UTF-8: with each token drawn, as many tokens as that are decoded again."""
MAX_TOPK = 1024
MAX_TOPK_CELLS = 2**26
"""Alternatives, of eight bytes each, that all tokens of an answer may have together."""
MAX_TARGET_CELLS = 2**24
"""Prompt positions times K of target_prompt_logprobs: a sparse tensor is small on the wire only."""
MAX_DRAWS = 64
MAX_DRAWN_CELLS = 2**34
"""Each draw of a prompt's alternatives goes through the whole vocabulary, and no other sample gets on
meanwhile: at most so many draws times vocabulary, 28,000 tokens with four draws each of Qwen3's 151,936."""


@dataclass(frozen=True, slots=True)
class SampleLimits:
    """What a model can do: ids below vocab_size, prompt and answer together max_length tokens."""

    vocab_size: int
    max_length: int
    eos_token_ids: Sequence[int]
    max_num_samples: int = 256


class SampleAddress(Lenient):
    """What a sample begins with; read by the handler, which refuses before there is a promise."""

    sampling_session_id: str
    seq_id: Counter | None = None


class SampleBody(Lenient):
    num_samples: int = 1
    prompt: Any = None
    sampling_params: Metadata = Field(default_factory=dict)
    prompt_logprobs: bool = False
    topk_prompt_logprobs: int = 0
    topk_sample_logprobs: int = 0
    target_prompt_logprobs: Any = None
    prompt_alt_tokens_k: int = 0
    prompt_logprobs_last_n: int | None = None


class _Params(Exact):
    max_tokens: int | None = None
    seed: Seed | None = None
    temperature: float = 1.0
    top_k: int = -1
    top_p: float = 1.0
    stop: Any = None


def decode_sample(body: Mapping[str, Any], limits: SampleLimits) -> SampleRequest:
    """Raises UserError naming the field and the limit."""
    sample = read(SampleBody, body)
    prompt = _prompt(sample.prompt, limits)
    _in_range("num_samples", sample.num_samples, 1, limits.max_num_samples)
    for name in ("topk_prompt_logprobs", "topk_sample_logprobs"):
        _in_range(name, getattr(sample, name), 0, min(MAX_TOPK, limits.vocab_size))
    _in_range("prompt_alt_tokens_k", sample.prompt_alt_tokens_k, 0, MAX_DRAWS)
    last_n = sample.prompt_logprobs_last_n
    if last_n is not None:
        _in_range("prompt_logprobs_last_n", last_n, 1, max(1, prompt.size - 1))
    params = limited(_params(sample.sampling_params, limits), prompt.size, limits)
    drawn = sample.num_samples * (params.max_tokens or 0)
    check_topk("topk_sample_logprobs", sample.topk_sample_logprobs, drawn)
    check_topk("topk_prompt_logprobs", sample.topk_prompt_logprobs, prompt.size)  # empty ones count as well
    _check_draws(sample.prompt_alt_tokens_k, prompt.size, limits.vocab_size)
    targets, target_cells = _targets(sample.target_prompt_logprobs, prompt.size, limits)
    return SampleRequest(
        prompt=prompt,
        params=params,
        num_samples=sample.num_samples,
        prompt_logprobs=sample.prompt_logprobs,
        topk_prompt_logprobs=sample.topk_prompt_logprobs,
        topk_sample_logprobs=sample.topk_sample_logprobs,
        target_prompt_tokens=targets,
        target_cells=target_cells,
        prompt_alt_tokens_k=sample.prompt_alt_tokens_k,
        prompt_logprobs_last_n=last_n,
    )


def limited(params: SamplingParams, prompt_size: int, limits: SampleLimits) -> SamplingParams:
    """``params`` with a ``max_tokens`` for which there is room behind the prompt. One that fills the context
    is still scored, and one token is drawn after it: nothing is ever read behind that one."""
    room = max(1, limits.max_length - prompt_size)
    return replace(params, max_tokens=room if params.max_tokens is None else min(params.max_tokens, room))


def check_topk(name: str, k: int, num_tokens: int) -> None:
    """All alternatives of an answer are kept until it is told. Raises UserError."""
    if k * num_tokens > MAX_TOPK_CELLS:
        raise UserError(
            f"{name} is {k} for up to {num_tokens} tokens of all samples: {k * num_tokens} alternatives; "
            f"at most {MAX_TOPK_CELLS} are possible; ask for fewer, or set max_tokens"
        )


def _check_draws(k: int, prompt_size: int, vocab_size: int) -> None:
    cells = k * prompt_size * vocab_size
    if cells > MAX_DRAWN_CELLS:
        raise UserError(
            f"prompt_alt_tokens_k is {k} for a prompt of {prompt_size} tokens: with a vocabulary of "
            f"{vocab_size}, at most {MAX_DRAWN_CELLS // (prompt_size * vocab_size)} are possible"
        )


def check_stop_strings(name: str, stops: Sequence[str]) -> None:
    """Raises UserError for one that is too long."""
    longest = max((len(stop.encode()) for stop in stops), default=0)
    if longest > MAX_STOP_BYTES:
        raise UserError(f"{name} has a string of {longest} bytes; at most {MAX_STOP_BYTES} are possible")


def _prompt(prompt: Any, limits: SampleLimits) -> npt.NDArray[np.int32]:
    try:
        tokens = text_tokens_from_json(prompt, max_chunks=limits.max_length, max_tokens=limits.max_length)
    except UserError as error:
        raise UserError(f"prompt {error}") from None
    if tokens.size == 0:
        raise UserError("prompt is empty; at least one token is needed")
    wrong = check_token_range(tokens, limits.vocab_size)
    if wrong is not None:
        raise UserError(
            f"prompt token {wrong} is {tokens[wrong]}, outside the vocabulary 0..{limits.vocab_size - 1}"
        )
    return tokens.astype(np.int32)


def _params(values: Mapping[str, Any], limits: SampleLimits) -> SamplingParams:
    params = read(_Params, values, "sampling_params")
    if params.max_tokens is not None and params.max_tokens < 1:
        raise UserError(f"sampling_params.max_tokens is {params.max_tokens}; it must be at least 1")
    if not math.isfinite(params.temperature) or params.temperature < 0:
        raise UserError(f"sampling_params.temperature is {params.temperature}; it must be finite and >= 0")
    if not 0 < params.top_p <= 1:
        raise UserError(f"sampling_params.top_p is {params.top_p}; it must be above 0 and at most 1")
    # null counts as absent, so the list that was really sent is looked at.
    stop_ids, stop_strings = _stops(params.stop, limits)
    return SamplingParams(
        max_tokens=params.max_tokens,
        temperature=params.temperature,
        top_k=max(-1, min(params.top_k, limits.vocab_size)),
        top_p=params.top_p,
        seed=params.seed,
        stop_token_ids=stop_ids,
        stop_strings=stop_strings,
    )


def _stops(stop: Any, limits: SampleLimits) -> tuple[tuple[int, ...], tuple[str, ...]]:
    """Absent: the model's own end of sequence. A list replaces it; an empty list stops nothing."""
    if stop is None:
        return tuple(limits.eos_token_ids), ()
    stops = [stop] if isinstance(stop, str) else stop
    where = "sampling_params.stop"
    if not isinstance(stops, list) or len(stops) > MAX_STOPS:
        raise UserError(f"{where} must be a string or a list of up to {MAX_STOPS} strings or token ids")
    if all(type(item) is int for item in stops):
        for item in stops:
            _in_range(where, item, 0, limits.vocab_size - 1)
        return tuple(stops), ()
    if all(isinstance(item, str) and item for item in stops):
        check_stop_strings(where, stops)
        return (), tuple(stops)
    raise UserError(f"{where} must hold non-empty strings only, or token ids only")


def _targets(
    value: Any, prompt_size: int, limits: SampleLimits
) -> tuple[npt.NDArray[np.int64] | None, Listed | None]:
    """target_prompt_logprobs: int64 [P-1, K], and which cells were listed if it is sparse. -1 asks for
    nothing, as does what CSR does not list."""
    if value is None:
        return None, None
    name = "target_prompt_logprobs"
    if prompt_size < 2:
        raise UserError(f"{name} needs a prompt of at least two tokens")
    try:
        _check_num_targets(value)
        tensor = tensor_from_json(value)
        if tensor.values.dtype.kind != "i":
            raise UserError("must be int64")
        if math.prod(tensor.shape) > MAX_TARGET_CELLS:
            raise UserError(f"has shape {list(tensor.shape)}; at most {MAX_TARGET_CELLS} cells are possible")
        # Unlisted CSR entries become 0, a real token id: shift so that 0 means "nothing asked".
        shifted = type(tensor)(tensor.values + 1, tensor.shape, tensor.crow, tensor.col)
        rows, width = shifted.as_rows(prompt_size - 1, MAX_TARGET_CELLS)
        if not width:
            raise UserError(f"must have shape [{prompt_size - 1}, K]")
    except UserError as error:
        raise UserError(f"{name} {error}") from None
    if check_token_range(rows, limits.vocab_size + 1) is not None:
        raise UserError(f"{name} holds an id outside -1..{limits.vocab_size - 1}")
    listed = None
    if tensor.crow is not None and tensor.col is not None:
        listed = Listed(tensor.crow, tensor.col)
    return (rows - 1).reshape(prompt_size - 1, width), listed


def _check_num_targets(value: Any) -> None:
    """Before they are looked at one by one. Raises UserError."""
    listed = value.get("data") if isinstance(value, dict) else None
    if isinstance(listed, list) and len(listed) > MAX_TARGET_CELLS:
        raise UserError(f"has {len(listed)} values; at most {MAX_TARGET_CELLS} are possible")


def _in_range(name: str, value: int, low: int, high: int) -> None:
    if not low <= value <= high:
        raise UserError(f"{name} is {value}; {low} to {high} are possible")
