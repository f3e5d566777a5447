"""``make bench-flood``: four modest tenants beside one that sends all it can, through a real server.

Windows with and without the flood follow each other, so that a busy machine disturbs both. The flood is a
process of its own that speaks plain HTTP and sends again what is refused; it counts refusals and results.
The modest ones use the SDK. Does not measure a machine of which the clients take a share, other than by
giving the flooding process the lowest priority: it would be somebody else's.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import httpx
import tinker
from tinker import types

from benchmarks.common import Report
from twinkle_serve.testing.models import build_tiny_llama
from twinkle_serve.testing.server import running_server

NUM_MODEST, ROUNDS, WINDOW_S, THINK_S = 4, 4, 20.0, 0.2
MODEST_TOKENS, FLOOD_TOKENS = 32, 256
LIMITS = {"tokens_per_s": 400, "token_burst_s": 1, "pending_requests": 24, "http_requests": 64}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", type=Path, default=Path("models"))
    parser.add_argument("--flood", metavar="URL", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.flood:
        os.nice(19)
        print(json.dumps(asyncio.run(Flood(options.flood).go())))
        return
    report = Report("flood")
    model = build_tiny_llama(options.models, tie_word_embeddings=True)
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        tree = {
            "models": [{"name": "llama", "path": str(model), "num_threads": 1, "device": "cpu"}],
            "storage": {"root": str(directory / "store")},
            "limits": {"tenant": LIMITS},
        }
        (directory / "config.yaml").write_text(json.dumps(tree))
        with running_server(directory / "config.yaml", log=directory / "server.log") as server:
            alone, beside, floods = measure(server.url)
    ratio = statistics.median(b / a for a, b in zip(alone, beside, strict=True))
    report.row("a modest tenant's step beside a flood, over without", ratio, "< 1.10")
    report.row("results the flood got, over requests accepted from it", floods[0] / floods[1], "1.00")
    report.row("requests of the flood that were held back at the door", floods[2], "> 0")
    print(f"    steps in ms without: {_ms(alone)}; with: {_ms(beside)}")
    report.write()


def measure(url: str) -> tuple[list[float], list[float], list[int]]:
    """Mean step of the modest tenants by window, without and with flood; results, accepted, refused."""
    modest = [Modest(url, number) for number in range(NUM_MODEST)]
    alone, beside, floods = [], [], [0, 0, 0]
    try:
        window(modest, 5.0)
        for _ in range(ROUNDS):
            alone.append(window(modest, WINDOW_S))
            command = [sys.executable, "-m", "benchmarks.flood", "--flood", url]
            with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as flood:
                time.sleep(8.0)  # until it has started and used up its burst
                beside.append(window(modest, WINDOW_S))
                assert flood.poll() is None, "the flood was over before the window was"
                output, _ = flood.communicate()
            floods = [a + b for a, b in zip(floods, json.loads(output), strict=True)]
    finally:
        for client in modest:
            client.service.holder.close()
    return alone, beside, floods


def window(modest: list[Modest], seconds: float) -> float:
    """The mean step of all, over ``seconds``."""
    until = time.monotonic() + seconds
    threads = [threading.Thread(target=client.steps, args=(until,)) for client in modest]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return statistics.fmean(step for client in modest for step in client.times)


class Modest:
    """A tenant that trains one small batch at a time and thinks in between."""

    def __init__(self, url: str, number: int) -> None:
        self.service = tinker.ServiceClient(base_url=url, api_key=f"tml-modest-{number}")
        self._client = self.service.create_lora_training_client("llama", rank=8)
        self._data = [_datum(range(number, number + MODEST_TOKENS))]
        self.times: list[float] = []

    def steps(self, until: float) -> None:
        self.times = []
        while time.monotonic() < until:
            began = time.perf_counter()
            step = self._client.forward_backward(self._data, "cross_entropy")
            self._client.optim_step(types.AdamParams(learning_rate=1e-4)).result()
            step.result()
            self.times.append(time.perf_counter() - began)
            time.sleep(THINK_S)


def _datum(tokens: range) -> types.Datum:
    inputs = {"target_tokens": types.TensorData(data=list(tokens), dtype="int64", shape=[len(tokens)])}
    return types.Datum(model_input=types.ModelInput.from_ints(list(tokens)), loss_fn_inputs=inputs)


class Flood:
    """One tenant with four runs and a sampler, of which each sends as fast as it is let."""

    def __init__(self, url: str) -> None:
        self._http = httpx.AsyncClient(
            base_url=f"{url}/api/v1/",
            headers={"X-API-Key": "tml-flood"},
            timeout=60,
            limits=httpx.Limits(max_connections=None),
        )
        self._until = time.monotonic() + 8.0 + WINDOW_S + 1.0
        self._accepted = self._refused = self._results = 0

    async def go(self) -> list[int]:
        session = (await self._send("create_session", {}))["session_id"]
        beating = asyncio.create_task(self._beat(session))
        body = {"session_id": session, "base_model": "llama", "sampling_session_seq_id": 0}
        sampler = (await self._send("create_sampling_session", body))["sampling_session_id"]
        await asyncio.gather(*(self._train(session, number) for number in range(4)), self._draw(sampler))
        beating.cancel()
        await self._send(f"sessions/{session}/finish", {})
        await self._http.aclose()
        return [self._results, self._accepted, self._refused]

    async def _beat(self, session: str) -> None:
        while True:
            await self._http.post("session_heartbeat", json={"session_id": session})
            await asyncio.sleep(10)

    async def _train(self, session: str, number: int) -> None:
        lora = {
            "session_id": session,
            "model_seq_id": number,
            "base_model": "llama",
            "lora_config": {"rank": 8},
        }
        run = (await self._result((await self._send("create_model", lora))["request_id"]))["model_id"]
        tokens = list(range(FLOOD_TOKENS))
        datum = {
            "model_input": {"chunks": [{"tokens": tokens}]},
            "loss_fn_inputs": {"target_tokens": {"data": tokens, "dtype": "int64", "shape": [FLOOD_TOKENS]}},
        }
        given = {"data": [datum], "loss_fn": "cross_entropy"}
        await self._all("forward_backward", {"model_id": run, "forward_backward_input": given}, 1)

    async def _draw(self, sampler: str) -> None:
        prompt = {"chunks": [{"tokens": list(range(8))}]}
        body = {"sampling_session_id": sampler, "prompt": prompt, "sampling_params": {"max_tokens": 16}}
        await self._all("asample", body, 0)

    async def _all(self, path: str, body: dict[str, Any], seq_id: int) -> None:
        """Send one request after the other, and ask for all results at once."""
        polls = []
        while time.monotonic() < self._until:
            accepted = await self._send(path, body | {"seq_id": seq_id})
            polls.append(asyncio.create_task(self._result(accepted["request_id"])))
            seq_id += 1
        await asyncio.gather(*polls)

    async def _send(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        while True:
            answer = await self._http.post(path, json=body)
            if answer.status_code != 429:
                break
            self._refused += 1
            await asyncio.sleep(1.0)
        assert answer.status_code in (200, 204), answer.text
        found: dict[str, Any] = answer.json() if answer.content else {}
        self._accepted += "request_id" in found
        return found

    async def _result(self, request_id: str) -> dict[str, Any]:
        while True:
            answer = await self._http.post("retrieve_future", json={"request_id": request_id})
            if answer.status_code == 200:
                break
            assert answer.status_code == 408, answer.text
        found: dict[str, Any] = answer.json()
        assert "error" not in found, found
        self._results += 1
        return found


def _ms(seconds: list[float]) -> str:
    return ", ".join(f"{1000 * value:.0f}" for value in seconds)


if __name__ == "__main__":
    main()
