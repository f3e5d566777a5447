"""The official openai client against a real server with two ingress replicas."""

from __future__ import annotations

import asyncio

import openai
import pytest

from twinkle_serve.testing.server import RunningServer

pytestmark = pytest.mark.slow
HELLO = [{"role": "user", "content": "Who are you?"}]


async def test_chats_streams_and_strangers(server: RunningServer) -> None:
    base_url = f"{server.url}/v1"
    async with openai.AsyncOpenAI(base_url=base_url, api_key="tml-openai", max_retries=0) as client:
        assert {model.id async for model in client.models.list()} >= {"llama", "moe"}
        asked = {"messages": HELLO, "max_tokens": 60, "seed": 3, "temperature": 1.0}
        for model in ("moe", "llama"):
            whole = await client.chat.completions.create(model=model, **asked)  # type: ignore[call-overload]
            stream = await client.chat.completions.create(  # type: ignore[call-overload]
                model=model, stream=True, **asked
            )
            said = [chunk.choices[0].delta.content or "" async for chunk in stream]
            assert "".join(said) == whole.choices[0].message.content
        with pytest.raises(openai.NotFoundError):
            await client.completions.create(model="tinker://other:train:0/weights/w", prompt="x")


async def test_the_first_tokens_arrive_while_the_last_are_drawn(server: RunningServer) -> None:
    base_url = f"{server.url}/v1"
    async with openai.AsyncOpenAI(base_url=base_url, api_key="tml-openai", max_retries=0) as client:
        streams = [
            await client.completions.create(
                model="moe", prompt="once upon", max_tokens=600, seed=seed, stream=True
            )
            for seed in range(3)
        ]

        async def count(stream: openai.AsyncStream) -> int:  # type: ignore[type-arg]
            return sum([bool(chunk.choices[0].text) async for chunk in stream])

        assert max(await asyncio.gather(*map(count, streams))) > 3
