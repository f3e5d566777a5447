"""Requests of the OpenAI-compatible endpoint, as lenient models.

Knows fields, defaults and what is refused because it would change the answer and is not done here. Does not
know text, templates or models.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated, Any, ClassVar

import numpy as np
from pydantic import Field

from twinkle_serve.protocol.data import SampleRequest, SamplingParams
from twinkle_serve.protocol.errors import UserError
from twinkle_serve.protocol.requests import Lenient, Metadata, Seed
from twinkle_serve.protocol.sample import (
    MAX_STOPS,
    SampleLimits,
    check_stop_strings,
    limited,
)

DEFAULT_MAX_TOKENS = 16  # of completions; a chat goes on to the end of the context
MAX_TOP_LOGPROBS = 20
MAX_CHOICES = 2048
"""Of a request with several prompts, n of each: an answer is written whole."""
MAX_TOLD_LOGPROBS = 2**20
"""Of an answer, alternatives included: as JSON each takes some 300 bytes and 4 microseconds."""
MAX_MESSAGES = 2**14
MAX_BODY_BYTES = 2**24

# The first item that is wrong ends the list: an error for each would take a hundred times the body's memory.
_Tokens = Annotated[list[int], Field(fail_fast=True)]
_Texts = Annotated[list[str], Field(fail_fast=True, max_length=MAX_CHOICES)]
_TokenLists = Annotated[list[_Tokens], Field(fail_fast=True, max_length=MAX_CHOICES)]
_Parts = Annotated[list[Metadata], Field(fail_fast=True)]


class StreamOptions(Lenient):
    include_usage: bool = False


class _Request(Lenient):
    """What both kinds share. ``_refused``: fields that are accepted with these values only."""

    model: str
    n: int = Field(1, ge=1)
    temperature: float = Field(1.0, ge=0, allow_inf_nan=False)
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: int = -1
    seed: Seed | None = None
    stop: str | _Texts = Field(default_factory=list)
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()
    logit_bias: Metadata = Field(default_factory=dict)
    presence_penalty: float = 0
    frequency_penalty: float = 0

    _refused: ClassVar[dict[str, tuple[Any, ...]]] = {
        "logit_bias": ({},),
        "presence_penalty": (0,),
        "frequency_penalty": (0,),
    }

    def check(self) -> None:
        """Raises UserError for what is not done here."""
        for name, accepted in self._refused.items():
            if getattr(self, name) not in accepted:
                raise UserError(f"{name} is not supported")

    @property
    def stops(self) -> tuple[str, ...]:
        """Raises UserError."""
        stops = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)
        if len(stops) > MAX_STOPS or not all(stops):
            raise UserError(f"stop must be a string or up to {MAX_STOPS} strings, none of them empty")
        check_stop_strings("stop", stops)
        return stops

    @property
    def num_prompts(self) -> int:
        return 1

    @property
    def num_tokens(self) -> int | None:
        raise NotImplementedError

    @property
    def num_logprobs(self) -> int | None:
        """How many alternatives to tell the logprobs of, besides the token drawn; None: tell none at all."""
        raise NotImplementedError

    def sample(self, prompt: Sequence[int], limits: SampleLimits) -> SampleRequest:
        """The request for ``prompt``. It ends at the model's own end as well as at ``stop``. Raises
        UserError."""
        if not prompt:
            raise UserError("the prompt is empty; at least one token is needed")
        if len(prompt) >= limits.max_length:
            raise UserError(
                f"the prompt has {len(prompt)} tokens, and this model's context of {limits.max_length} must "
                "hold the answer as well"
            )
        if not 0 <= min(prompt) <= max(prompt) < limits.vocab_size:
            raise UserError(f"prompt: token ids must be from 0 to {limits.vocab_size - 1}")
        if self.n > limits.max_num_samples:
            raise UserError(f"n is {self.n}; at most {limits.max_num_samples} are possible")
        params = SamplingParams(
            max_tokens=self.num_tokens,
            temperature=self.temperature,
            top_k=max(-1, min(self.top_k, limits.vocab_size)),
            top_p=self.top_p,
            seed=self.seed,
            stop_token_ids=tuple(limits.eos_token_ids),
            stop_strings=self.stops,
        )
        params = limited(params, len(prompt), limits)
        top = min(self.num_logprobs or 0, limits.vocab_size)
        if self.num_logprobs is not None:
            self._check_told(self.n * (params.max_tokens or 0), top)
        return SampleRequest(np.asarray(prompt, np.int32), params, self.n, topk_sample_logprobs=top)

    def _check_told(self, num_tokens: int, top: int) -> None:
        """``num_tokens``: of all choices for one prompt. Raises UserError."""
        most = MAX_TOLD_LOGPROBS // self.num_prompts
        if num_tokens * (1 + top) > most:
            raise UserError(
                f"logprobs of up to {num_tokens} tokens with {top} alternatives each are asked for; at most "
                f"{most} can be told of a prompt here; ask for fewer, or set max_tokens"
            )


class Completion(_Request):
    """POST /v1/completions. A prompt is text or token ids, or a list of either."""

    prompt: str | _Tokens | _Texts | _TokenLists
    max_tokens: Annotated[int, Field(ge=1)] = DEFAULT_MAX_TOKENS
    logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None
    echo: bool = False
    suffix: str = ""
    best_of: int | None = None

    _refused: ClassVar[dict[str, tuple[Any, ...]]] = _Request._refused | {
        "echo": (False,),
        "suffix": ("",),
    }

    def check(self) -> None:
        super().check()
        if self.best_of not in (None, self.n):
            raise UserError("best_of is not supported")
        if not self.prompt:
            raise UserError("prompt is empty")
        if self.stream and len(self.prompts) > 1:
            raise UserError("stream: one prompt at a time is possible")
        num_prompts = self.num_prompts
        if num_prompts > 1 and num_prompts * self.n > MAX_CHOICES:
            raise UserError(
                f"prompt is a list of {num_prompts} and n is {self.n}; their product is {MAX_CHOICES} at most"
            )

    @property
    def prompts(self) -> Sequence[str | list[int]]:
        if isinstance(self.prompt, str) or isinstance(self.prompt[0], int):
            return [self.prompt]
        return self.prompt

    @property
    def num_prompts(self) -> int:
        return len(self.prompts)

    @property
    def num_tokens(self) -> int | None:
        return self.max_tokens

    @property
    def num_logprobs(self) -> int | None:
        return self.logprobs


class Message(Lenient):
    """``content``: text, or parts of which only text is understood."""

    role: str
    content: str | _Parts = ""
    name: str | None = None
    tool_calls: list[Any] = Field(default_factory=list)

    def as_dict(self) -> dict[str, str]:
        """For a chat template. Raises UserError."""
        text = self.content
        if self.tool_calls:
            raise UserError("messages: tool_calls are not supported")
        if not isinstance(text, str):
            if any(part.get("type") != "text" or not isinstance(part.get("text"), str) for part in text):
                raise UserError("messages: only text is understood")
            text = "".join(part["text"] for part in text)
        return {"role": self.role, "content": text} | ({"name": self.name} if self.name else {})


class Chat(_Request):
    """POST /v1/chat/completions. ``chat_template_kwargs``: further variables of the model's template."""

    messages: list[Message] = Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool = False
    top_logprobs: int = Field(0, ge=0, le=MAX_TOP_LOGPROBS)
    chat_template_kwargs: Metadata = Field(default_factory=dict)
    tools: list[Any] = Field(default_factory=list)
    functions: list[Any] = Field(default_factory=list)
    response_format: Metadata = Field(default_factory=lambda: {"type": "text"})

    _refused: ClassVar[dict[str, tuple[Any, ...]]] = _Request._refused | {
        "tools": ([],),
        "functions": ([],),
        "response_format": ({"type": "text"},),
    }

    @property
    def num_tokens(self) -> int | None:
        asked = self.max_completion_tokens
        return self.max_tokens if asked is None else asked

    @property
    def num_logprobs(self) -> int | None:
        return self.top_logprobs if self.logprobs else None


def finite(logprob: float) -> float:
    """A logprob as JSON can hold it."""
    return logprob if math.isfinite(logprob) else -9999.0
