"""Two ingress replicas, requests out of order and twice, polls anywhere: each is applied once, in order."""

from __future__ import annotations

import asyncio
import random
from typing import Any

import httpx
import pytest

from twinkle_serve.testing.server import RunningServer

pytestmark = pytest.mark.slow
NUM_REQUESTS = 200
TOKENS = list(range(7, 23))


class Client:
    """What an SDK does, without its care for order. Each call may go over another connection."""

    def __init__(self, http: httpx.AsyncClient) -> None:
        self._http = http

    async def post(self, path: str, body: dict[str, Any]) -> httpx.Response:
        return await self._http.post(f"/api/v1/{path}", json=body)

    async def submit(self, path: str, body: dict[str, Any]) -> str:
        answer = await self.post(path, body)
        assert answer.status_code == 200, answer.text
        return str(answer.json()["request_id"])

    async def result(self, request_id: str) -> dict[str, Any]:
        while True:
            answer = await self.post("retrieve_future", {"request_id": request_id})
            if answer.status_code != 408:
                assert answer.status_code == 200, answer.text
                value: dict[str, Any] = answer.json()
                return value

    async def new_run(self) -> str:
        session = (await self.post("create_session", {"tags": [], "user_metadata": {}})).json()["session_id"]
        body = {
            "session_id": session,
            "model_seq_id": 0,
            "base_model": "llama",
            "lora_config": {"rank": 4, "seed": 5},
        }
        return str((await self.result(await self.submit("create_model", body)))["model_id"])


def _request(run_id: str, seq_id: int) -> tuple[str, dict[str, Any]]:
    """Odd ones are passes, even ones optimizer steps whose rate depends on the number."""
    if seq_id % 2 == 0:
        rate = 1e-4 * (1 + seq_id % 7)
        return "optim_step", {"model_id": run_id, "seq_id": seq_id, "adam_params": {"learning_rate": rate}}
    targets = {"data": TOKENS[1:], "dtype": "int64", "shape": [len(TOKENS) - 1]}
    chunks = [{"type": "encoded_text", "tokens": TOKENS[:-1]}]
    datum = {"model_input": {"chunks": chunks}, "loss_fn_inputs": {"target_tokens": targets}}
    loss = {"data": [datum], "loss_fn": "cross_entropy"}
    return "forward_backward", {"model_id": run_id, "seq_id": seq_id, "forward_backward_input": loss}


async def _losses(client: Client, ids: list[str]) -> list[float]:
    """Of the passes, which see what all steps before them did."""
    results = await asyncio.gather(*(client.result(request_id) for request_id in ids[::2]))
    return [result["metrics"]["loss:sum"] for result in results]


async def _in_order(client: Client) -> list[float]:
    run_id = await client.new_run()
    ids = [await client.submit(*_request(run_id, seq_id)) for seq_id in range(1, NUM_REQUESTS + 1)]
    return await _losses(client, ids)


async def _in_disorder(client: Client) -> list[float]:
    rng = random.Random(3)
    run_id = await client.new_run()
    found: dict[int, list[str]] = {}

    async def send(seq_id: int) -> None:
        await asyncio.sleep(rng.random() * 0.5)
        found.setdefault(seq_id, []).append(await client.submit(*_request(run_id, seq_id)))

    numbers = [*range(1, NUM_REQUESTS + 1)] * 2
    rng.shuffle(numbers)
    await asyncio.gather(*(send(seq_id) for seq_id in numbers))
    assert all(len(set(ids)) == 1 for ids in found.values())
    for twice in range(1, NUM_REQUESTS, 10):
        first, second = await asyncio.gather(*(client.result(found[twice][0]) for _ in range(2)))
        assert first == second
    return await _losses(client, [found[n][0] for n in range(1, NUM_REQUESTS + 1)])


async def test_200_requests_in_disorder_train_like_200_in_order(server: RunningServer) -> None:
    limits = httpx.Limits(max_connections=64, max_keepalive_connections=8)
    headers = {"X-API-Key": "tml-ordering"}
    async with httpx.AsyncClient(base_url=server.url, headers=headers, limits=limits, timeout=60) as http:
        client = Client(http)
        ordered, disordered = await asyncio.gather(_in_order(client), _in_disorder(client))
    assert len(set(ordered)) == NUM_REQUESTS // 2
    assert disordered == pytest.approx(ordered, rel=1e-4)
