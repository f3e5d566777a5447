"""A client program with N tenants, told over standard input what to do: ``python program.py URL MODEL``.

One JSON object a line comes in, one goes out. Needs nothing but the ``tinker`` SDK, any version, so that it
runs in a peer's environment too; ``--twinkle`` first makes the SDK send the headers that Twinkle's gateway
needs. A process of its own: whoever measures must not be slowed by what is measured.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
import threading
import time
import uuid
from collections import deque
from collections.abc import Callable
from typing import Any

TIMEOUT_S = 300.0
SENT = {"bytes": 0, "largest": 0}


class Tenant:
    """One key with one run. ``step`` is forward_backward and optim_step on the same batch."""

    def __init__(self, sdk: Any, options: argparse.Namespace, key: str) -> None:
        self._types = sdk.types
        self._service = sdk.ServiceClient(base_url=options.url, api_key=key)
        self._create = lambda rank: built(self._service.create_lora_training_client(options.model, rank=rank))
        self._vocabulary = options.vocabulary
        self._batches: dict[tuple[int, int], list[Any]] = {}
        self._runs = []
        self.key = key

    def open(self, rank: int) -> float:
        """Seconds until the run is there."""
        began = time.perf_counter()
        self._runs.append(self._create(rank))
        return time.perf_counter() - began

    @property
    def run(self) -> Any:
        return self._runs[-1]

    def forward_backward(self, tokens: int, datum: int) -> Any:
        return self.run.forward_backward(self._batch(tokens, datum), "cross_entropy")

    def optim_step(self, learning_rate: float) -> Any:
        return self.run.optim_step(self._types.AdamParams(learning_rate=learning_rate))

    def _batch(self, tokens: int, datum: int) -> list[Any]:
        """``tokens`` in datums of at most ``datum``; made once."""
        if (tokens, datum) not in self._batches:
            draw = random.Random(tokens)
            count = max(1, tokens // datum)
            self._batches[tokens, datum] = [self._datum(draw, min(tokens, datum)) for _ in range(count)]
        return self._batches[tokens, datum]

    def _datum(self, draw: random.Random, length: int) -> Any:
        words = [draw.randrange(5, self._vocabulary) for _ in range(length + 1)]
        tensor = self._types.TensorData
        inputs = {
            "target_tokens": tensor(data=words[1:], dtype="int64", shape=[length]),
            "weights": tensor(data=[1.0] * length, dtype="float32", shape=[length]),
        }
        return self._types.Datum(
            model_input=self._types.ModelInput.from_ints(words[:-1]), loss_fn_inputs=inputs
        )


def built(client: Any) -> Any:
    """The client behind the future that newer SDKs return from ``create_*``."""
    return client.result() if hasattr(client, "result") else client


def train(tenant: Tenant, order: dict[str, Any], begin: float) -> dict[str, Any]:
    """Steps until there were ``steps`` or ``seconds`` are over. depth 0: each operation is awaited before the
    next is sent; depth n: so many steps are in flight. Times in seconds; ``ends`` from the common
    beginning."""
    times: dict[str, list[float]] = {"forward_backward": [], "optim_step": [], "step": [], "ends": []}
    flying: deque[tuple[float, Any, Any]] = deque()
    last = 0.0

    def land() -> None:
        nonlocal last
        sent, passing, stepping = flying.popleft()
        last = passing.result(timeout=TIMEOUT_S).metrics.get("loss:sum", 0.0)
        stepping.result(timeout=TIMEOUT_S)
        times["step"].append(time.perf_counter() - sent)
        times["ends"].append(time.perf_counter() - begin)

    number = 0
    while number < order.get("steps", sys.maxsize):
        if time.perf_counter() - begin > order.get("seconds", TIMEOUT_S):
            break
        number += 1
        sent = time.perf_counter()
        passing = tenant.forward_backward(order["tokens"], order.get("datum", 64))
        if not order["depth"]:
            passing.result(timeout=TIMEOUT_S)
            times["forward_backward"].append(time.perf_counter() - sent)
        half = time.perf_counter()
        stepping = tenant.optim_step(order.get("learning_rate", 1e-4))
        flying.append((sent, passing, stepping))
        if len(flying) >= max(1, order["depth"]):
            land()
        if not order["depth"]:
            times["optim_step"].append(time.perf_counter() - half)
    while flying:
        land()
    return times | {"steps": number, "loss": last}


def together(tasks: list[Callable[[], Any]]) -> list[Any]:
    """Each in a thread of its own; their results, or the first error."""
    found: list[Any] = [None] * len(tasks)

    def run(number: int) -> None:
        try:
            found[number] = tasks[number]()
        except Exception as error:
            found[number] = error

    threads = [threading.Thread(target=run, args=(number,)) for number in range(len(tasks))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for item in found:
        if isinstance(item, Exception):
            raise item
    return found


class Program:
    def __init__(self, sdk: Any, options: argparse.Namespace) -> None:
        self._sdk, self._options = sdk, options
        self._tenants: list[Tenant] = []

    def open(self, order: dict[str, Any]) -> dict[str, Any]:
        """So many more tenants, each with a run."""
        keys = order.get("keys") or [f"tml-{uuid.uuid4().hex}" for _ in range(order["tenants"])]
        new = together([lambda key=key: Tenant(self._sdk, self._options, key) for key in keys])
        rank = order.get("rank", 8)
        seconds = together([lambda tenant=tenant: tenant.open(rank) for tenant in new])
        self._tenants += new
        return {"create_s": seconds}

    def more(self, order: dict[str, Any]) -> dict[str, Any]:
        """Further runs for some tenants, one after another for each."""

        def run(tenant: Tenant) -> list[float]:
            return [tenant.open(order.get("rank", 8)) for _ in range(order["count"])]

        found = together([lambda n=n: run(self._tenants[n]) for n in order["tenants"]])
        return {"create_s": [seconds for each in found for seconds in each]}

    def sample(self, order: dict[str, Any]) -> dict[str, Any]:
        service = self._sdk.ServiceClient(base_url=self._options.url, api_key=f"tml-{uuid.uuid4().hex}")
        client = service.create_sampling_client(base_model=self._options.model)
        params = self._sdk.types.SamplingParams(max_tokens=order["tokens"], temperature=1.0, stop=[])
        began, whole = time.perf_counter(), 0
        prompts = [[5 + n % 300, 9, 11 + n % 7] for n in range(order["count"])]
        as_input = self._sdk.types.ModelInput.from_ints
        futures = [client.sample(as_input(words), 1, params) for words in prompts]
        for future in futures:
            (sequence,) = future.result(timeout=TIMEOUT_S).sequences
            whole += len(sequence.tokens) == order["tokens"]
        return {"wall": time.perf_counter() - began, "whole": whole}

    def train(self, order: dict[str, Any]) -> dict[str, Any]:
        """All the named tenants at once; ``rates`` gives each its own learning rate."""
        cpu, sent, began = time.process_time(), SENT.copy(), time.perf_counter()
        rates = order.get("rates") or [order.get("learning_rate", 1e-4)] * len(order["tenants"])
        tasks = [
            lambda tenant=self._tenants[number], rate=rate: train(
                tenant, order | {"learning_rate": rate}, began
            )
            for number, rate in zip(order["tenants"], rates, strict=True)
        ]
        found = together(tasks)
        return {
            "wall": time.perf_counter() - began,
            "cpu": time.process_time() - cpu,
            "largest_body": SENT["largest"],
            "sent_bytes": SENT["bytes"] - sent["bytes"],
            "tenants": found,
        }


def count_bodies() -> None:
    """Note the size of every request that this process sends."""
    import httpx

    send = httpx.AsyncClient.send

    async def counting(client: Any, request: Any, **options: Any) -> Any:
        size = int(request.headers.get("content-length", 0))
        SENT["bytes"] += size
        SENT["largest"] = max(SENT["largest"], size)
        return await send(client, request, **options)

    httpx.AsyncClient.send = counting  # type: ignore[method-assign]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("url")
    parser.add_argument("model")
    parser.add_argument("--vocabulary", type=int, default=350)
    parser.add_argument("--twinkle", action="store_true")
    options = parser.parse_args()
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever a library prints must not be taken for an answer
    if options.twinkle:
        from twinkle_client import init_tinker_client

        init_tinker_client()
    import tinker

    count_bodies()
    program = Program(tinker, options)
    for line in sys.stdin:
        order = json.loads(line)
        try:
            answer = getattr(program, order.pop("do"))(order)
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), file=answers, flush=True)
    os._exit(0)  # clients' threads may still be busy


if __name__ == "__main__":
    main()
