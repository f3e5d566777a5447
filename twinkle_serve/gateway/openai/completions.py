"""POST /completions and POST /chat/completions, whole or as server-sent events.

Knows the way from a body to an answer. The JSON of answers is in answers.py and chunks.py.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from functools import partial
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from twinkle_serve.gateway.context import Authenticated, Call
from twinkle_serve.gateway.http import describes, reply
from twinkle_serve.gateway.openai.answers import Answer, ChatShape, Shape, TextShape
from twinkle_serve.gateway.openai.chunks import Chunks
from twinkle_serve.gateway.openai.errors import error_body
from twinkle_serve.gateway.openai.following import finished, followed, submitted
from twinkle_serve.gateway.openai.models import Target, Texts, find
from twinkle_serve.gateway.openai.tokenizer import ModelText
from twinkle_serve.protocol.data import SampleRequest, SampleResult
from twinkle_serve.protocol.errors import UserError
from twinkle_serve.protocol.openai import MAX_BODY_BYTES, Chat, Completion
from twinkle_serve.protocol.requests import read
from twinkle_serve.protocol.results import dump
from twinkle_serve.protocol.sample import SampleLimits

router = APIRouter(tags=["openai"])
_FEW_TOKENS = 2**12  # which become text at once
_KEEP_ALIVE = b": still here\n\n"


@router.post("/completions", openapi_extra=describes(Completion))
async def completions(request: Request, call: Authenticated) -> Response:
    body = read(Completion, await call.object(request, MAX_BODY_BYTES))
    body.check()
    target, text = await _open(request, call, body.model)
    for prompt in body.prompts:
        if isinstance(prompt, str):
            _check_length("prompt has", len(prompt), text, call.limits_of(target.info))
    prompts = await asyncio.to_thread(
        lambda: [text.encode(prompt) if isinstance(prompt, str) else prompt for prompt in body.prompts]
    )
    return await _answer(request, call, target, text, body, TextShape(), prompts)


@router.post("/chat/completions", openapi_extra=describes(Chat))
async def chat(request: Request, call: Authenticated) -> Response:
    body = read(Chat, await call.object(request, MAX_BODY_BYTES))
    body.check()
    target, text = await _open(request, call, body.model)
    messages = [message.as_dict() for message in body.messages]
    variables, limits = body.chat_template_kwargs, call.limits_of(target.info)
    if len(messages) > limits.max_length:
        raise UserError(
            f"there are {len(messages)} messages; this model's context holds {limits.max_length} tokens"
        )
    length = sum(len(value) for message in messages for value in message.values())
    most = _check_length("messages have", length, text, limits)
    _check_length("chat_template_kwargs have", _num_characters(variables), text, limits)
    prompt = await asyncio.to_thread(text.encode_chat, messages, variables, most)
    return await _answer(request, call, target, text, body, ChatShape(), [prompt])


def _check_length(what: str, num_characters: int, text: ModelText, limits: SampleLimits) -> int:
    """Before it is turned into tokens, which takes time. Returns the limit. Raises UserError."""
    most = limits.max_length * text.longest_token
    if num_characters > most:
        raise UserError(
            f"{what} {num_characters} characters; this model's context of {limits.max_length} tokens "
            f"holds at most {most}"
        )
    return most


def _num_characters(variables: Mapping[str, Any]) -> int:
    """Raises UserError."""
    try:
        return len(json.dumps(variables))
    except RecursionError:
        raise UserError("chat_template_kwargs are nested too deeply") from None


async def _open(request: Request, call: Call, model: str) -> tuple[Target, ModelText]:
    target = await find(call, model)
    texts: Texts = request.app.state.texts
    return target, await texts.of(target.info)


async def _answer(
    request: Request,
    call: Call,
    target: Target,
    text: ModelText,
    body: Completion | Chat,
    shape: Shape,
    prompts: Sequence[Sequence[int]],
) -> Response:
    limits = call.limits_of(target.info)
    requests = [body.sample(prompt, limits) for prompt in prompts]

    def answer(request_id: str) -> Answer:
        wants_logprobs = body.num_logprobs is not None
        eos = limits.eos_token_ids
        return Answer(shape, body.model, text, eos, body.stops, wants_logprobs, request_id)

    if body.stream:
        events = _events(call, target, requests[0], answer, body.stream_options.include_usage)
        return await EventStream.opened(events)
    async with submitted(call, target, requests) as request_ids:
        results = await finished(call, request, request_ids)
    num_prompt_tokens = [len(prompt) for prompt in prompts]
    num_drawn = sum(len(sequence.tokens) for result in results for sequence in result.sequences)
    tell = partial(answer(request_ids[0]).whole, results, num_prompt_tokens)
    return await call.beside(lambda: reply(tell()), num_drawn * (1 + (body.num_logprobs or 0)), _FEW_TOKENS)


async def _events(
    call: Call,
    target: Target,
    sample: SampleRequest,
    make_answer: Callable[[str], Answer],
    include_usage: bool,
) -> AsyncGenerator[bytes, None]:
    """Server-sent events; the first item is empty and says that the request was accepted. What goes wrong
    after that is an event, and the sample is cancelled."""
    accepted = False
    try:
        async with submitted(call, target, [sample], stream=True) as (request_id,):
            answer = make_answer(request_id)
            chunks = Chunks(answer)
            accepted = True
            yield b""
            async for news in followed(call, request_id):
                choices = chunks.end(news) if isinstance(news, SampleResult) else chunks.grow(news)
                yield b"".join(_event(answer.chunk([choice])) for choice in choices) or _KEEP_ALIVE
                if isinstance(news, SampleResult) and include_usage:
                    yield _event(answer.chunk([], answer.usage([news], [len(sample.prompt)])))
    except Exception as error:
        if not accepted:
            raise
        yield _event(error_body(error)[1])
    yield b"data: [DONE]\n\n"


def _event(value: dict[str, Any]) -> bytes:
    return b"data: " + dump(value) + b"\n\n"


class EventStream(StreamingResponse):
    """Ends ``events`` also when the client goes away while it is being written to."""

    def __init__(self, events: AsyncGenerator[bytes, None]) -> None:
        super().__init__(events, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        self._events = events

    @classmethod
    async def opened(cls, events: AsyncGenerator[bytes, None]) -> EventStream:
        """Once the request is accepted; what is wrong with it is raised, and becomes the response."""
        await anext(events)
        return cls(events)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            await self._events.aclose()
