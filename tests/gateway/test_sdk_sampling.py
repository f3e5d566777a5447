"""The real SDK: one poll for all samples of a client, and sampling clients of the kind inflight."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import tinker
from tinker import types

from tests.gateway.inprocess import serving
from twinkle_serve.config import Config
from twinkle_serve.gateway import futures
from twinkle_serve.testing.server import free_port

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]
KEY = "tml-one-poll"
NUM_SAMPLES = 40


@pytest.fixture(scope="module")
def url(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    tree = {
        "models": [{"name": "llama", "path": str(tiny_llama), "num_threads": 1, "device": "cpu"}],
        "storage": {"root": str(tmp_path_factory.mktemp("store"))},
        "http": {"port": free_port(), "one_poll_for_samples": True},
    }
    with serving(Config.model_validate(tree)) as url:
        yield url


async def test_every_sample_comes_in_and_bad_ones_fail(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    polls: list[Any] = []
    reading = futures.read

    def noted(model: Any, raw: Any) -> Any:
        polls.append(model)
        return reading(model, raw)

    monkeypatch.setattr(futures, "read", noted)
    service = tinker.ServiceClient(base_url=url, api_key=KEY)
    sampler = await service.create_sampling_client_async(base_model="llama")

    async def one(number: int) -> Any:
        params = types.SamplingParams(max_tokens=4 + number % 9, seed=number, stop=[])
        return await sampler.sample_async(types.ModelInput.from_ints([5 + number, 9, 11]), 1, params)

    async def bad() -> None:
        params = types.SamplingParams(max_tokens=4, top_p=7.0)
        with pytest.raises(tinker.RequestFailedError, match="top_p"):
            await sampler.sample_async(types.ModelInput.from_ints([5]), 1, params)

    results, _ = await asyncio.gather(asyncio.gather(*(one(n) for n in range(NUM_SAMPLES))), bad())
    for number, result in enumerate(results):
        assert len(result.sequences[0].tokens) == 4 + number % 9
    again = await one(0)
    assert again.sequences[0].tokens == results[0].sequences[0].tokens
    assert 0 < polls.count(futures.RetrieveFutures) < NUM_SAMPLES
    await service.close("success")


async def test_inflight_clients_move_on_and_snapshots_do_not(url: str) -> None:
    service = tinker.ServiceClient(base_url=url, api_key=KEY)
    run = await service.create_lora_training_client_async(base_model="llama", rank=4)
    prompt = types.ModelInput.from_ints([5, 9, 11, 4])

    async def scores(sampler: Any) -> list[float | None]:
        return list(await sampler.compute_logprobs_async(prompt))

    async def step() -> None:
        inputs = {"target_tokens": [9, 11, 4, 7], "weights": [1.0] * 4}
        datum = types.Datum(model_input=prompt, loss_fn_inputs=inputs)
        await run.forward_backward_async([datum], "cross_entropy")
        await (await run.optim_step_async(types.AdamParams(learning_rate=0.05)))

    await step()
    frozen = await run.save_weights_and_get_sampling_client_async()
    first = await run.save_weights_and_get_sampling_client_async(kind="inflight")
    before = await scores(first)
    assert before == await scores(frozen)
    await step()
    assert await scores(first) == before, "nothing newer was published"
    second = await run.save_weights_and_get_sampling_client_async(kind="inflight")
    after = await scores(second)
    assert after != before
    assert await scores(first) == after
    assert await scores(frozen) == before
    await service.close("success")


def test_a_poll_says_what_is_wrong_with_it(url: str) -> None:
    with httpx.Client(base_url=f"{url}/api/v1", headers={"X-API-Key": KEY}) as http:
        unknown = {"target": {"type": "sampling_session", "sampling_session_id": "nobody's"}}
        assert http.post("/retrieve_futures", json=unknown).status_code == 404
        for body, field in (({}, "target"), (unknown | {"prev_cursor": -1}, "prev_cursor")):
            answer = http.post("/retrieve_futures", json=body)
            assert answer.status_code == 400
            assert field in answer.json()["detail"]
