"""Part ``control``: everything but the model, under load, with an engine that computes nothing.

Knows HTTP, the SDK and the planner from outside. What is left of a request's cost here is what no faster
hardware takes away.
"""

from __future__ import annotations

import itertools
import statistics
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from benchmarks.clients import Clients, clients_of
from benchmarks.measure import Budget, in_turn, quantile
from benchmarks.null_engine import VOCABULARY
from benchmarks.services import MODEL, Service, our_server
from benchmarks.table import Rows
from tests.e2e.test_sampling_load import heartbeats
from twinkle_serve.control.backend import OptimCommand, PassCommand
from twinkle_serve.control.commands import RunCommand
from twinkle_serve.control.log import CommandLog
from twinkle_serve.control.planner import Planner
from twinkle_serve.protocol.data import AdamParams

NUM_SAMPLES = 512
NUM_BODIES = 208
NUM_RUNS = 8
BODY_TOKENS = 47 * 4096
BACKLOGS = (10, 100, 1_000, 10_000, 100_000)


def run(rows: Rows, budget: Budget, models: Path) -> None:
    with our_server(Path("none"), module="benchmarks.null_engine") as server:
        log = server.scratch / "client"
        options: dict[str, Any] = {"log": log, "vocabulary": VOCABULARY}
        with clients_of(server.url, MODEL, **options) as training:
            training.open(NUM_RUNS)
            training.train(range(NUM_RUNS), tokens=4096, datum=4096, depth=1, steps=1)
            host_cost(rows, budget, server, training)
            with clients_of(server.url, MODEL, log=server.scratch / "sampling") as sampling:
                everything_at_once(rows, budget, server, training, sampling)
    backlog(rows, budget)


def host_cost(rows: Rows, budget: Budget, server: Service, training: Clients) -> None:
    """CPU of all server processes for large forward_backward requests of one run at a time, a token."""
    used, before = server.clock.seconds(), server.clock.by_name()
    steps = 1 if budget.quick else 12
    answer = training.train([0], tokens=BODY_TOKENS, datum=4096, depth=2, steps=steps)
    tokens = BODY_TOKENS * steps
    spent = {name: round(s - before.get(name, 0.0), 2) for name, s in server.clock.by_name().items()}
    rows.add(
        "host cost of a token in forward_backward",
        1e6 * (server.clock.seconds() - used) / tokens,
        "us",
        "<= 1",
        cpu={name: seconds for name, seconds in spent.items() if seconds > 0.02},
        detail={
            "tokens": tokens,
            "body bytes": answer["largest_body"],
            "client us/token": 1e6 * answer["cpu"] / tokens,
            "tokens/s": tokens / answer["wall"],
        },
    )


def everything_at_once(
    rows: Rows, budget: Budget, server: Service, training: Clients, sampling: Clients
) -> None:
    """512 samples and 208 large bodies from two clients, and the heartbeats of a third."""
    num_samples, each = (32, 1) if budget.quick else (NUM_SAMPLES, NUM_BODIES // NUM_RUNS)
    used = server.clock.seconds()
    with heartbeats(server.url) as latencies, ThreadPoolExecutor(2) as pool:
        began = time.perf_counter()
        bodies = pool.submit(
            training.train, range(NUM_RUNS), tokens=BODY_TOKENS, datum=4096, depth=2, steps=each
        )
        samples = pool.submit(sampling.sample, num_samples, 16)
        trained, drawn = bodies.result(), samples.result()
        seconds = time.perf_counter() - began
    answered = sum(len(tenant["ends"]) for tenant in trained["tenants"])
    lost = num_samples - drawn["whole"] + NUM_RUNS * each - answered
    what = f"{num_samples} samples and {NUM_RUNS * each} bodies of {trained['largest_body'] / 1e6:.1f} MB"
    rows.add(f"{what}: lost", lost, "requests", "<= 0", cpu={"server s": server.clock.seconds() - used})
    rows.add(
        f"{what}: p99 of heartbeats meanwhile",
        1000 * quantile(latencies, 0.99),
        "ms",
        "<= 500",
        detail={
            "p50 ms": 1000 * quantile(latencies, 0.5),
            "heartbeats": len(latencies),
            "samples took s": drawn["wall"],
            "all took s": seconds,
        },
    )


def backlog(rows: Rows, budget: Budget) -> None:
    """Time to plan one tick while so many requests wait, in two forms: more requests for the same 64 runs,
    and more runs with two requests each."""
    for label, runs_of in (("64 runs", lambda _: 64), ("2 for each run", lambda n: max(1, n // 2))):
        planners = {count: planner_with(count, min(count, runs_of(count))) for count in BACKLOGS}
        arms = {str(count): lambda planner=planner: plan(planner) for count, planner in planners.items()}
        found = in_turn(arms, rounds=30, seconds=60, warmup=0)
        # The shortest backlog has no work left after a few ticks.
        taken = {
            count: statistics.median(seconds for seconds in found[str(count)] if seconds is not None)
            for count in BACKLOGS
        }
        rows.add(
            f"planning a tick with {BACKLOGS[-1]:,} requests waiting ({label}), over {BACKLOGS[1]}",
            taken[BACKLOGS[-1]] / taken[BACKLOGS[1]],
            target="<= 2",
            detail={f"us at {count}": 1e6 * seconds for count, seconds in taken.items()},
        )


def planner_with(num_requests: int, num_runs: int) -> Planner:
    """So many requests wait for runs of up to 64 tenants."""
    planner = Planner(tick_tokens=4096, max_runs=16, company_wait_s=0.0)
    logs: list[CommandLog[RunCommand]] = [CommandLog(300.0) for _ in range(num_runs)]
    numbers = itertools.cycle(range(num_runs))
    for count in range(num_requests):
        log = logs[number := next(numbers)]
        seq_id = 1 + count // num_runs
        command: RunCommand = (
            PassCommand(b"", (256,), "cross_entropy", {}, True) if seq_id % 2 else OptimCommand(AdamParams())
        )
        log.append(seq_id, f"{number}:{seq_id}", command, 0.0)
    for number, log in enumerate(logs):
        planner.ready(f"tenant {number % 64}", f"run {number}", log, 0.0)
    return planner


def plan(planner: Planner) -> float | None:
    """CPU seconds to plan one tick; None if there was nothing to plan."""
    began = time.process_time()
    window = planner.next(0.0)
    planner.finished(0.0)
    return time.process_time() - began if window.work else None
