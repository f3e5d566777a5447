"""Both endpoints over a backend that says what a test tells it: requests, text, chunks, hanging up."""

from __future__ import annotations

import asyncio
import json
from dataclasses import replace
from typing import Any

import httpx
import numpy as np
import pytest

from tests.gateway.scripted import ScriptedBackend
from twinkle_serve.config import Config
from twinkle_serve.control.backend import NotFound, Poll
from twinkle_serve.gateway.app import create_app
from twinkle_serve.gateway.openai import completions, following
from twinkle_serve.gateway.openai.tokenizer import ModelText
from twinkle_serve.protocol.data import SampleDelta, SampledSequence, SampleRequest, SampleResult, TopK
from twinkle_serve.protocol.errors import BackendUnavailable, UserError
from twinkle_serve.protocol.work import Failure

EOS = 299
CHAT = {"model": "Qwen/Tiny", "messages": [{"role": "user", "content": "hi"}]}


def sequence(tokens: list[int], stop_reason: str = "stop", k: int = 0) -> SampledSequence:
    topk = None
    if k:
        ids = np.tile(np.arange(k, dtype=np.int32), (len(tokens), 1))
        topk = TopK(ids, np.full((len(tokens), k), -0.5, np.float32))
    return SampledSequence(
        np.asarray(tokens, np.int32), np.full(len(tokens), -1.5, np.float32), stop_reason, topk
    )


def delta(tokens: list[int], index: int = 0) -> SampleDelta:
    return SampleDelta(index, np.asarray(tokens, np.int32), np.full(len(tokens), -1.5, np.float32))


def answers(backend: ScriptedBackend, *sequences: SampledSequence, cached: int = 0) -> None:
    backend.polls["sample-0"] = Poll("done", value=SampleResult(sequences, prompt_cache_hit_tokens=cached))


async def post(client: httpx.AsyncClient, path: str = "/chat/completions", **body: Any) -> Any:
    answer = await client.post(path, json=CHAT | body)
    assert answer.status_code == 200, answer.text
    return answer.json()


async def events(client: httpx.AsyncClient, path: str = "/chat/completions", **body: Any) -> list[Any]:
    answer = await client.post(path, json=CHAT | body | {"stream": True})
    assert answer.headers["content-type"].startswith("text/event-stream")
    lines = [line.removeprefix("data: ") for line in answer.text.split("\n\n") if line.startswith("data: ")]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


def asked(backend: ScriptedBackend) -> SampleRequest:
    request = backend.samples[-1]
    assert isinstance(request, SampleRequest)
    return request


# Requests ---------------------------------------------------------------------------------------------------


async def test_what_is_asked_of_the_backend(
    client: httpx.AsyncClient, backend: ScriptedBackend, text: ModelText
) -> None:
    answers(backend, sequence([10]), sequence([11]))
    await post(
        client,
        n=2,
        temperature=0.5,
        top_p=0.9,
        top_k=5,
        seed=-1,
        stop="x",
        max_tokens=99,
        max_completion_tokens=7,
        logprobs=True,
        top_logprobs=3,
        user=None,
        some_new_field={"a": 1},
    )
    request = asked(backend)
    assert request.prompt.tolist() == text.encode_chat(CHAT["messages"], {})  # type: ignore[arg-type]
    params = request.params
    assert (params.max_tokens, params.temperature, params.top_p, params.top_k) == (7, 0.5, 0.9, 5)
    assert (params.seed, params.stop_token_ids, params.stop_strings) == (2**63 - 1, (EOS,), ("x",))
    assert (request.num_samples, request.topk_sample_logprobs) == (2, 3)
    assert backend.asked("sample_model")[0][1:3] == ("Qwen/Tiny", None)


async def test_a_chat_goes_on_to_the_end_of_the_context_and_a_completion_for_16_tokens(
    client: httpx.AsyncClient, backend: ScriptedBackend
) -> None:
    answers(backend, sequence([10]))
    await post(client)
    assert asked(backend).params.max_tokens == 200 - asked(backend).prompt.size
    backend.polls["sample-1"] = backend.polls["sample-0"]
    await post(client, "/completions", prompt="hi")
    assert asked(backend).params.max_tokens == 16


async def test_a_checkpoint_is_asked_for_by_its_path(
    client: httpx.AsyncClient, backend: ScriptedBackend
) -> None:
    answers(backend, sequence([10]))
    answer = await post(client, model="twinkle://r:train:0/sampler_weights/a")
    assert answer["model"] == "twinkle://r:train:0/sampler_weights/a"
    path = "tinker://r:train:0/sampler_weights/a"
    assert backend.asked("weights_info")[0][1] == path
    assert backend.asked("sample_model")[0][1:3] == (None, path)


async def test_content_may_come_in_parts(
    client: httpx.AsyncClient, backend: ScriptedBackend, text: ModelText
) -> None:
    answers(backend, sequence([10]))
    parts = [{"type": "text", "text": "h"}, {"type": "text", "text": "i"}]
    await post(client, messages=[{"role": "user", "content": parts}])
    assert asked(backend).prompt.tolist() == text.encode_chat(CHAT["messages"], {})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"prompt": ""}, "prompt is empty"),
        ({"prompt": []}, "prompt is empty"),
        ({"prompt": [[]]}, "prompt is empty"),
        ({"prompt": [0, 300]}, "from 0 to 299"),
        ({"prompt": [1] * 200}, "200 tokens"),
        ({"prompt": "x", "n": 257}, "at most 256"),
        ({"prompt": "x", "stop": [""]}, "stop"),
        ({"prompt": "x", "stop": ["s"] * 65}, "stop"),
        ({"prompt": "x", "stop": ["s", "s" * 257]}, "stop has a string of 257 bytes; at most 256"),
        ({"prompt": "x", "echo": True}, "echo is not supported"),
        ({"prompt": "x", "suffix": "y"}, "suffix is not supported"),
        ({"prompt": "x", "best_of": 3}, "best_of is not supported"),
        ({"prompt": "x", "logit_bias": {"1": 5}}, "logit_bias is not supported"),
        ({"prompt": ["x", "y"], "stream": True}, "one prompt"),
        ({"prompt": "x", "logprobs": 21}, "logprobs"),
        ({"prompt": "x", "logprobs": 20, "n": 256, "max_tokens": 199}, "at most 1048576 can be told"),
        ({"prompt": ["x"] * 64, "logprobs": 9, "n": 16, "max_tokens": 199}, "at most 16384 can be told"),
        ({"prompt": {"a": 1}}, "prompt"),
        ({"prompt": "x", "temperature": "hot"}, "temperature"),
        ({}, "prompt"),
    ],
)
async def test_what_is_refused(
    client: httpx.AsyncClient, backend: ScriptedBackend, body: dict[str, Any], message: str
) -> None:
    answer = await client.post("/completions", json={"model": "Qwen/Tiny"} | body)
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert message in error["message"]
    assert error["type"] == "invalid_request_error"
    assert backend.samples == []


# Whole answers ----------------------------------------------------------------------------------------------


async def test_an_answer_without_the_token_that_ended_it(
    client: httpx.AsyncClient, backend: ScriptedBackend, text: ModelText
) -> None:
    tokens = text.encode("the nation")
    answers(backend, sequence([*tokens, EOS], k=2), sequence(tokens, "length", k=2), cached=3)
    answer = await post(client, n=2, logprobs=True, top_logprobs=2)
    one, two = answer["choices"]
    assert one["message"]["content"] == two["message"]["content"] == "the nation"
    assert (one["finish_reason"], two["finish_reason"]) == ("stop", "length")
    assert len(one["logprobs"]["content"]) == len(tokens)
    assert one["logprobs"]["content"][0]["top_logprobs"][1]["logprob"] == -0.5
    usage = answer["usage"]
    assert usage["completion_tokens"] == 2 * len(tokens) + 1
    assert usage["prompt_tokens_details"]["cached_tokens"] == 3


async def test_parts_of_characters_are_told_as_bytes(
    client: httpx.AsyncClient, backend: ScriptedBackend, text: ModelText
) -> None:
    said = "\U0001f9a9a\u9f98"
    tokens = text.encode(said)
    assert len(tokens) > len(said)
    top = TopK(np.array([tokens[:3]] * len(tokens)), -np.arange(3.0).repeat(len(tokens)).reshape(3, -1).T)
    answers(backend, replace(sequence(tokens, "length"), topk=top))
    backend.polls["sample-1"] = backend.polls["sample-0"]
    answer = await post(client, logprobs=True, top_logprobs=3)
    content = answer["choices"][0]["logprobs"]["content"]
    assert bytes(byte for entry in content for byte in entry["bytes"]).decode() == said
    answer = await post(client, "/completions", prompt="x", logprobs=3)
    (told, *_) = answer["choices"][0]["logprobs"]["top_logprobs"]
    assert told == {r"bytes:\xf0": 0, r"bytes:\x9f": -1, r"bytes:\xa6": -2}


async def test_the_stop_string_is_left_out(
    client: httpx.AsyncClient, backend: ScriptedBackend, text: ModelText
) -> None:
    answers(backend, sequence(text.encode("one; two. three")))
    answer = await post(client, "/completions", prompt="x", stop=["three", ". t"])
    assert answer["choices"][0]["text"] == "one; two"


async def test_an_infinite_logprob_is_still_json(client: httpx.AsyncClient, backend: ScriptedBackend) -> None:
    odd = SampledSequence(np.array([70], np.int32), np.array([-np.inf], np.float32), "length")
    answers(backend, odd)
    answer = await post(client, "/completions", prompt="x", logprobs=0)
    assert answer["choices"][0]["logprobs"]["token_logprobs"] == [-9999.0]


@pytest.mark.parametrize(
    ("poll", "status"),
    [
        (Poll("done", failure=Failure("diverged")), 400),
        (Poll("done", failure=Failure("broken", "server")), 500),
        (Poll("gone"), 503),
    ],
)
async def test_failures(client: httpx.AsyncClient, backend: ScriptedBackend, poll: Poll, status: int) -> None:
    backend.polls["sample-0"] = poll
    answer = await client.post("/chat/completions", json=CHAT)
    assert answer.status_code == status
    assert answer.json()["error"]["message"]
    backend.polls["sample-1"] = poll
    (event,) = await events(client)
    assert event["error"]["message"] == answer.json()["error"]["message"]


@pytest.mark.parametrize(
    ("error", "status"),
    [(NotFound("no"), 404), (BackendUnavailable("wait"), 503), (RuntimeError("bug"), 500)],
)
@pytest.mark.parametrize("stream", [False, True])
async def test_errors_before_an_answer_begins(
    client: httpx.AsyncClient, backend: ScriptedBackend, error: Exception, status: int, stream: bool
) -> None:
    backend.error = error
    answer = await client.post("/chat/completions", json=CHAT | {"stream": stream})
    assert answer.status_code == status
    assert "bug" not in answer.text


# Streams ----------------------------------------------------------------------------------------------------


async def test_a_stream_says_everything_once(
    client: httpx.AsyncClient, backend: ScriptedBackend, text: ModelText
) -> None:
    tokens = text.encode("a nation 🙂 and more")
    for cut in (0, 1, 3, len(tokens)):
        backend.deltas = [delta([token]) for token in tokens[:cut]] + [delta(tokens[:cut], 1)]
        number = len(backend.samples)
        whole = SampleResult((sequence([*tokens, EOS]), sequence(tokens, "length")))
        backend.polls[f"sample-{number}"] = Poll("done", value=whole)
        found = await events(client, stream_options={"include_usage": True})
        for index in (0, 1):
            choices = [c for event in found for c in event["choices"] if c["index"] == index]
            assert "".join(c["delta"].get("content", "") for c in choices) == "a nation 🙂 and more"
            assert [c["delta"]["role"] for c in choices if "role" in c["delta"]] == ["assistant"]
            assert [c["finish_reason"] for c in choices].count(None) == len(choices) - 1
        assert found[-1]["choices"] == []
        assert found[-1]["usage"]["completion_tokens"] == 2 * len(tokens) + 1
        assert len({event["id"] for event in found}) == 1


async def test_text_that_may_become_a_stop_string_waits(
    client: httpx.AsyncClient, backend: ScriptedBackend, text: ModelText
) -> None:
    tokens = [token for letter in "ab<stop" for token in text.encode(letter)]
    backend.deltas = [delta([token]) for token in tokens]
    answers(backend, sequence(tokens, "length"))
    found = await events(client, "/completions", prompt="x", stop="<stop>")
    assert [event["choices"][0]["text"] for event in found] == ["a", "b", "<stop", ""]
    backend.deltas = [delta([token]) for token in tokens]
    ended = [*tokens, *text.encode(">")]
    backend.polls["sample-1"] = Poll("done", value=SampleResult((sequence(ended),)))
    found = await events(client, "/completions", prompt="x", stop="<stop>")
    assert "".join(event["choices"][0]["text"] for event in found) == "ab"


async def test_streamed_logprobs_are_those_of_the_whole(
    client: httpx.AsyncClient, backend: ScriptedBackend, text: ModelText
) -> None:
    tokens = text.encode("several tokens")
    backend.deltas = [delta(tokens[:2])]
    answers(backend, sequence([*tokens, EOS]))
    found = await events(client, logprobs=True)
    told = [c["logprobs"]["content"] for event in found for c in event["choices"] if c["logprobs"]]
    assert [len(content) for content in told] == [2, len(tokens) - 2]


async def test_offsets_go_on_from_chunk_to_chunk(
    client: httpx.AsyncClient, backend: ScriptedBackend, text: ModelText
) -> None:
    tokens = text.encode("several tokens of text")
    backend.deltas = [delta(tokens[:2]), delta(tokens[2:3])]
    answers(backend, sequence([*tokens, EOS]))
    found = await events(client, "/completions", prompt="x", logprobs=0)
    told = [c["logprobs"] for event in found for c in event["choices"] if c["logprobs"]]
    assert len(told) == 3
    offsets = [offset for each in told for offset in each["text_offset"]]
    pieces = [piece for each in told for piece in each["tokens"]]
    assert offsets == [len("".join(pieces[:row])) for row in range(len(tokens))]


async def test_a_sample_whose_stream_fails_midway_is_cancelled(
    client: httpx.AsyncClient, backend: ScriptedBackend, text: ModelText
) -> None:
    backend.deltas = [delta(text.encode("several"))]
    backend.polls["sample-0"] = Poll("done", failure=Failure("broken", "server"))
    found = await events(client)
    assert "error" in found[-1]
    await asyncio.sleep(0)
    assert [arguments[1] for arguments in backend.asked("cancel")] == ["sample-0"]


async def test_text_that_cannot_fit_is_refused_before_it_is_turned_into_tokens(
    client: httpx.AsyncClient, text: ModelText, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ModelText, "_encode", lambda *_, **__: pytest.fail("it was encoded"))
    long = "x" * 10**6
    for path, fields in (
        ("/completions", {"prompt": long}),
        ("/completions", {"prompt": ["x", long]}),
        ("/chat/completions", {"messages": [{"role": "user", "content": long}]}),
        ("/chat/completions", {"messages": [{"role": long, "content": ""}]}),
        ("/chat/completions", {"messages": [{"role": "user", "name": long}]}),
        ("/chat/completions", {"chat_template_kwargs": {"tools": [{"function": long}]}}),
    ):
        answer = await client.post(path, json=CHAT | fields)
        assert answer.status_code == 400
        assert "characters; this model's context of" in answer.json()["error"]["message"]


async def test_a_chat_has_fewer_messages_than_the_context_has_tokens(client: httpx.AsyncClient) -> None:
    body = CHAT | {"messages": [{"role": "user", "content": ""}] * 201}
    answer = await client.post("/chat/completions", json=body)
    assert answer.status_code == 400
    assert "201 messages; this model's context holds 200" in answer.json()["error"]["message"]


def test_variables_of_a_template_that_are_nested_too_deeply_are_named() -> None:
    value: Any = 1
    for _ in range(10**5):
        value = [value]
    with pytest.raises(UserError, match="chat_template_kwargs are nested too deeply"):
        completions._num_characters({"a": value})


async def test_calls_of_tools_are_refused(client: httpx.AsyncClient) -> None:
    message = {"role": "assistant", "content": "", "tool_calls": [{"id": "1"}]}
    answer = await client.post("/chat/completions", json=CHAT | {"messages": [message]})
    assert answer.status_code == 400
    assert "tool_calls" in answer.json()["error"]["message"]


# Hanging up -------------------------------------------------------------------------------------------------


async def hang_up(backend: ScriptedBackend, body: dict[str, Any]) -> None:
    """Send a request, and go away as soon as it was accepted."""
    config = Config.model_validate({"models": [{"name": "Qwen/Tiny", "path": "/models/tiny"}]})
    app = create_app(lambda: backend, config)
    sent = [{"type": "http.request", "body": json.dumps(CHAT | body).encode(), "more_body": False}]

    async def receive() -> dict[str, Any]:
        if sent:
            return sent.pop()
        while not backend.samples:
            await asyncio.sleep(0)
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        pass

    scope = {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.3"},
        "method": "POST",
        "path": "/v1/chat/completions",
        "root_path": "",
        "query_string": b"",
        "headers": [(b"authorization", b"Bearer tml-x")],
    }
    await asyncio.wait_for(app(scope, receive, send), 20)  # type: ignore[arg-type]
    await asyncio.gather(*following._cancelling)


@pytest.mark.parametrize("stream", [False, True])
async def test_a_client_that_hangs_up_cancels_its_sample(
    backend: ScriptedBackend, monkeypatch: pytest.MonkeyPatch, stream: bool
) -> None:
    monkeypatch.setattr(following, "_LOOK_EVERY_S", 0.01)
    await hang_up(backend, {"stream": stream})
    assert [arguments[1] for arguments in backend.asked("cancel")] == ["sample-0"]


async def test_nothing_is_cancelled_that_came_to_its_end(
    client: httpx.AsyncClient, backend: ScriptedBackend
) -> None:
    answers(backend, sequence([10]))
    await post(client)
    backend.polls["sample-1"] = backend.polls["sample-0"]
    await events(client)
    assert backend.asked("cancel") == []
