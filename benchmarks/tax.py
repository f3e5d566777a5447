"""Part ``tax``: what the way from the SDK to the engine and back costs.

The bare arm is our own engine in this process, stepped in a loop; the other arm is the unmodified SDK in a
second process, through HTTP, Ray Serve and the coordinator, to the same engine with the same batches. Both
take their turns in one run, first with Serve's own proxy in front, then with HAProxy.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import torch

from benchmarks.clients import ClientError, Clients, clients_of
from benchmarks.engine import MICROBATCH_TOKENS, Tenants
from benchmarks.measure import Budget, in_ms, in_turn, quantile, ratio, typical
from benchmarks.services import MODEL, Service, our_server
from benchmarks.table import Rows
from twinkle_serve.control.microbatches import Load, pack
from twinkle_serve.protocol.data import AdamParams
from twinkle_serve.protocol.work import OptimStep, Pass, Tick
from twinkle_serve.testing.models import build_tiny_qwen3_moe

SIZES = (256, 512, 4096)
TARGETS = {512: ">= 0.5", 4096: ">= 0.85"}
DEPTHS = {"one at a time": 0, "pair sent together": 1, "pipelined": 3}


@dataclass(frozen=True, slots=True)
class Proxy:
    """setting: of ``http.proxy``. added_ms: what an operation may add to its compute behind it."""

    setting: str
    name: str
    added_ms: str


PROXIES = (Proxy("serve", "Serve's own proxy", "<= 20"), Proxy("haproxy", "HAProxy", "<= 10"))


class Bare:
    """The engine without anything around it, on one thread as in the server."""

    def __init__(self, directory: Path) -> None:
        torch.set_num_threads(1)
        self._tenants = Tenants(directory, 1)
        self._batches = {tokens: self._tenants.batch(tokens) for tokens in SIZES}

    def steps(self, tokens: int, count: int) -> float:
        """Tokens a second."""
        began = time.perf_counter()
        for _ in range(count):
            self._tenants.step([0], [self._batches[tokens]])
        return tokens * count / (time.perf_counter() - began)

    def operations(self, tokens: int, count: int) -> dict[str, float]:
        """Median seconds of each half of a step."""
        batch = self._batches[tokens]
        lengths = tuple(batch.lengths.tolist())
        microbatches = pack([Load(0, True, lengths)], MICROBATCH_TOKENS, False)
        passing = Pass("pass", 0, batch.pack(), "cross_entropy", {}, True)
        ticks = {
            "forward_backward": Tick(1, passes=(passing,), microbatches=microbatches),
            "optim_step": Tick(1, optim_steps=(OptimStep("step", 0, AdamParams()),)),
        }
        times: dict[str, list[float]] = {name: [] for name in ticks}
        for _ in range(count):
            for name, tick in ticks.items():
                times[name].append(self._timed(tick))
        return {name: statistics.median(values) for name, values in times.items()}

    def _timed(self, tick: Tick) -> float:
        began = time.perf_counter()
        list(self._tenants.engine.run(tick))
        return time.perf_counter() - began


def run(rows: Rows, budget: Budget, models: Path) -> None:
    directory = build_tiny_qwen3_moe(models, vocab_size=350)
    bare = Bare(directory)
    for proxy in PROXIES:
        try:
            behind(rows, Budget.of(budget.seconds / len(PROXIES), budget.quick), directory, bare, proxy)
        except (ClientError, RuntimeError) as error:
            last = str(error).strip().splitlines()[-1]
            rows.skip(f"the rest behind {proxy.name}", f"does not run here: {last}"[:300])


def behind(rows: Rows, budget: Budget, directory: Path, bare: Bare, proxy: Proxy) -> None:
    """Everything with one proxy in front."""
    settings = {"http": {"proxy": proxy.setting}}
    with (
        our_server(directory, settings=settings) as server,
        clients_of(server.url, MODEL, log=server.scratch / "client") as clients,
    ):
        clients.open(1)
        clients.train([0], tokens=512, depth=2, steps=2 if budget.quick else 20)
        throughput(rows, budget, bare, clients, server, proxy)
        added_latency(rows, budget, bare, clients, server, proxy)
        births(rows, budget, clients, proxy)


def throughput(
    rows: Rows, budget: Budget, bare: Bare, clients: Clients, server: Service, proxy: Proxy
) -> None:
    """Tokens a second through everything, over the bare loop's."""
    for tokens in SIZES:
        count = 2 if budget.quick else max(3, 2048 // tokens)
        arms: dict[str, Callable[[], Any]] = {"bare": lambda t=tokens, n=count: bare.steps(t, n)}
        for name, depth in DEPTHS.items():
            arms[name] = lambda t=tokens, n=count, d=depth: _through(clients, server, t, n, d)
        # Rounds are short: a part of the time for each size, about two thirds in all.
        seconds = 0 if budget.quick else budget.share(0.2)
        found = in_turn(arms, rounds=2 if budget.quick else 60, seconds=seconds, min_rounds=1)
        computing = 1000 * tokens / statistics.median(found["bare"])
        for name in DEPTHS:
            speeds = [each["tokens_per_s"] for each in found[name]]
            cpu = {f"{part} s/step": seconds for part, seconds in typical(found[name], "cpu").items()}
            rows.add(
                f"{tokens} tokens a step, {name}, {proxy.name}: tokens/s over the bare loop",
                ratio(speeds, found["bare"]),
                target=TARGETS.get(tokens, "") if name == "pipelined" else "",
                why=f"the engine computes for {computing:.0f} ms a step; CPU on two cores: {in_ms(cpu)}",
                cpu=cpu,
                detail={
                    "service tokens/s": statistics.median(speeds),
                    "bare tokens/s": statistics.median(found["bare"]),
                    "rounds": len(speeds),
                },
            )


def _through(clients: Clients, server: Service, tokens: int, count: int, depth: int) -> dict[str, Any]:
    before = server.clock.by_part()
    answer = clients.train([0], tokens=tokens, depth=depth, steps=count + 2 * depth)
    steps = answer["tenants"][0]["steps"]
    return {
        "tokens_per_s": tokens * steps / answer["wall"],
        "cpu": server.clock.since(before, steps) | {"client": answer["cpu"] / steps},
    }


def added_latency(
    rows: Rows, budget: Budget, bare: Bare, clients: Clients, server: Service, proxy: Proxy
) -> None:
    """What each operation takes the client longer than the engine computes, one at a time, at 512 tokens; and
    what the emptiest request takes through the same proxy, beside it."""
    count = 3 if budget.quick else 15
    arms: dict[str, Callable[[], Any]] = {
        "bare": lambda: bare.operations(512, count),
        "service": lambda: _operations(clients, server, count),
        "ping": lambda: pings(server.url, count),
    }
    found = in_turn(arms, rounds=1 if budget.quick else 40, seconds=budget.share(0.15), min_rounds=1)
    ping = 1000 * statistics.median(second for each in found["ping"] for second in each)
    rows.add(f"a request that does nothing, p50, {proxy.name}", ping, "ms")
    cpu = {f"{part} s/step": seconds for part, seconds in typical(found["service"], "cpu").items()}
    for name in ("forward_backward", "optim_step"):
        computing = statistics.median(each[name] for each in found["bare"])
        waiting = [1000 * (second - computing) for each in found["service"] for second in each[name]]
        rows.add(
            f"{name} adds to its compute, p50, {proxy.name}",
            quantile(waiting, 0.5),
            "ms",
            proxy.added_ms,
            why=f"two requests, where one that does nothing takes {ping:.1f} ms, and a tick between them; "
            f"CPU of a step, which is two operations: {in_ms(cpu)}",
            cpu=cpu,
            detail={
                "compute p50 ms": 1000 * computing,
                "added p90 ms": quantile(waiting, 0.9),
                "added p99 ms": quantile(waiting, 0.99),
                "operations": len(waiting),
            },
        )


def _operations(clients: Clients, server: Service, count: int) -> dict[str, Any]:
    before = server.clock.by_part()
    answer = clients.train([0], tokens=512, depth=0, steps=count)
    used = server.clock.since(before, count) | {"client": answer["cpu"] / count}
    return answer["tenants"][0] | {"cpu": used}


def pings(url: str, count: int) -> list[float]:
    """Seconds of each of ``count`` requests for the server's health, over one connection."""
    taken = []
    with closing(HTTPConnection(url.removeprefix("http://"), timeout=60)) as connection:
        for _ in range(count):
            began = time.perf_counter()
            connection.request("GET", "/api/v1/healthz")
            answer = connection.getresponse()
            answer.read()
            assert answer.status == 200, answer.status
            taken.append(time.perf_counter() - began)
    return taken


def births(rows: Rows, budget: Budget, clients: Clients, proxy: Proxy) -> None:
    """create_model on a server that is warm, as long as the client waits for it."""
    count = 3 if budget.quick else 20
    taken = [1000 * seconds for seconds in clients.more([0], count)]
    rows.add(
        f"create_model, warm, p50, {proxy.name}",
        quantile(taken, 0.5),
        "ms",
        "<= 200",
        detail={"p90 ms": quantile(taken, 0.9), "runs": count},
    )
