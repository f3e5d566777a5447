"""The official ``openai`` client against the service in one process."""

from __future__ import annotations

import gc
import json
from collections.abc import Iterator
from pathlib import Path

import httpx
import openai
import pytest
import tinker
from tinker import types
from transformers import AutoTokenizer

from tests.gateway.inprocess import serving
from twinkle_serve.config import Config

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]
KEY, STRANGER = "tml-openai", "tml-stranger"
HELLO = [{"role": "user", "content": "Who are you?"}]


@pytest.fixture(scope="module")
def url(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    from twinkle_serve.testing.server import free_port

    tree = {
        "models": [{"name": "llama", "path": str(tiny_llama), "num_threads": 1, "device": "cpu"}],
        "storage": {"root": str(tmp_path_factory.mktemp("store"))},
        "http": {"port": free_port()},
    }
    with serving(Config.model_validate(tree)) as url:
        yield url
    gc.collect()  # sockets that the SDK left open, while their warnings are still ignored


@pytest.fixture(scope="module")
def client(url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{url}/v1", api_key=KEY, max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def checkpoint(url: str) -> str:
    """A trained adapter that differs visibly from its base model."""
    with tinker.ServiceClient(base_url=url, api_key=KEY) as service:
        return trained(service.create_lora_training_client(base_model="llama", rank=8).result())


def trained(run: tinker.TrainingClient) -> str:
    tokens = list(range(5, 21))
    inputs = {"target_tokens": types.TensorData(data=tokens[1:], dtype="int64", shape=[15])}
    datum = types.Datum(model_input=types.ModelInput.from_ints(tokens[:-1]), loss_fn_inputs=inputs)
    for _ in range(4):
        run.forward_backward([datum], "cross_entropy")
        run.optim_step(types.AdamParams(learning_rate=3e-2))
    return run.save_weights_for_sampler("mine").result().path


def test_models_are_base_models_and_ones_own_checkpoints(
    client: openai.OpenAI, url: str, checkpoint: str
) -> None:
    assert [model.id for model in client.models.list()] == ["llama", checkpoint]
    assert client.models.retrieve("llama").object == "model"
    with openai.OpenAI(base_url=f"{url}/v1", api_key=STRANGER) as stranger:
        assert [model.id for model in stranger.models.list()] == ["llama"]


def test_a_greedy_chat_is_what_the_sdk_samples(client: openai.OpenAI, url: str, tiny_llama: Path) -> None:
    answer = client.chat.completions.create(
        model="llama", messages=HELLO, temperature=0, max_completion_tokens=12, logprobs=True, top_logprobs=2
    )
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    prompt = tokenizer.apply_chat_template(
        HELLO, add_generation_prompt=True, tokenize=True, return_dict=False
    )
    params = types.SamplingParams(max_tokens=12, temperature=0)
    with tinker.ServiceClient(base_url=url, api_key=KEY) as service:
        sampler = service.create_sampling_client(base_model="llama").result()
        (expected,) = sampler.sample(types.ModelInput.from_ints(prompt), 1, params).result().sequences
    (choice,) = answer.choices
    assert choice.message.content == tokenizer.decode(expected.tokens, skip_special_tokens=True)
    assert choice.message.role == "assistant"
    assert choice.finish_reason == expected.stop_reason
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == len(prompt)
    assert answer.usage.completion_tokens == len(expected.tokens)
    assert choice.logprobs is not None
    told = [entry.logprob for entry in choice.logprobs.content or []]
    assert told == pytest.approx(expected.logprobs[: len(told)], abs=1e-4)
    assert all(entry.top_logprobs[0].logprob >= entry.logprob for entry in choice.logprobs.content or [])


def test_streams_say_the_same_as_whole_answers(client: openai.OpenAI, checkpoint: str) -> None:
    for model in ("llama", checkpoint):
        asked = {
            "model": model,
            "messages": HELLO,
            "n": 3,
            "seed": 7,
            "max_tokens": 24,
            "stop": ["e", "<|im_end|>"],
        }
        whole = client.chat.completions.create(**asked)  # type: ignore[call-overload]
        stream = client.chat.completions.create(  # type: ignore[call-overload]
            **asked, stream=True, stream_options={"include_usage": True}
        )
        chunks = list(stream)
        assert chunks[-1].usage == whole.usage or chunks[-1].usage.total_tokens == whole.usage.total_tokens
        for choice in whole.choices:
            mine = [c for chunk in chunks for c in chunk.choices if c.index == choice.index]
            assert mine[0].delta.role == "assistant"
            assert "".join(c.delta.content or "" for c in mine) == choice.message.content
            assert [c.finish_reason for c in mine if c.finish_reason] == [choice.finish_reason]
            assert "e" not in choice.message.content


def test_the_first_tokens_of_a_stream_come_before_the_last(client: openai.OpenAI) -> None:
    stream = client.completions.create(model="llama", prompt="once", max_tokens=400, stream=True)
    texts = [chunk.choices[0].text for chunk in stream]
    assert len([text for text in texts if text]) > 1


def test_completions(client: openai.OpenAI) -> None:
    answer = client.completions.create(
        model="llama", prompt=["one", "two"], n=2, max_tokens=5, temperature=0, logprobs=1
    )
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    assert answer.choices[0].text == answer.choices[1].text != answer.choices[2].text
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert 1 <= len(logprobs.tokens or []) == len(logprobs.token_logprobs or []) <= 5
    stream = client.completions.create(
        model="llama", prompt="one", max_tokens=5, temperature=0, logprobs=1, stream=True
    )
    chunks = [chunk.choices[0] for chunk in stream]
    assert "".join(chunk.text for chunk in chunks) == answer.choices[0].text
    streamed = [p for chunk in chunks if chunk.logprobs for p in chunk.logprobs.token_logprobs or []]
    assert streamed == pytest.approx(logprobs.token_logprobs, abs=1e-5)
    ids = client.completions.create(model="llama", prompt=[5, 6, 7], max_tokens=1)
    assert ids.usage is not None
    assert ids.usage.prompt_tokens == 3


def test_another_tenants_checkpoint_is_absent(url: str, checkpoint: str) -> None:
    with openai.OpenAI(base_url=f"{url}/v1", api_key=STRANGER, max_retries=0) as stranger:
        for name in (checkpoint, "tinker://no/weights/thing", "gpt"):
            with pytest.raises(openai.NotFoundError) as caught:
                stranger.chat.completions.create(model=name, messages=HELLO)
            assert caught.value.code == "model_not_found"


def test_errors_look_like_openais(client: openai.OpenAI, url: str) -> None:
    for wrong in (
        {"messages": []},
        {"n": 0},
        {"temperature": -1},
        {"presence_penalty": 1},
        {"tools": [{"type": "function", "function": {"name": "f"}}]},
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
        {"model": "tinker://nonsense"},
        {"messages": [{"role": "user", "content": "long " * 5000}]},
    ):
        with pytest.raises(openai.BadRequestError) as caught:
            client.chat.completions.create(**({"model": "llama", "messages": HELLO} | wrong))
        assert caught.value.type == "invalid_request_error"
        assert caught.value.message
    with pytest.raises(openai.BadRequestError, match="echo"):
        client.completions.create(model="llama", prompt="x", echo=True)
    nobody = httpx.post(f"{url}/v1/chat/completions", json={})
    assert nobody.status_code == 401
    assert nobody.json()["error"]["code"] == "invalid_api_key"
    assert json.loads(httpx.get(f"{url}/v1/nothing").text)["error"]["type"] == "not_found_error"
