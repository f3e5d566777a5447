"""Part ``tenancy``: what more tenants cost the server, and whether they get what they are due.

All clients live in one program; the server's CPU time is that of all its processes.
"""

from __future__ import annotations

import asyncio
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.clients import Clients, clients_of
from benchmarks.measure import Budget, in_ms, in_turn, jain, ratio, typical, worst_deviation
from benchmarks.services import BEHIND_HAPROXY, MODEL, Service, our_server
from benchmarks.table import Rows
from twinkle_serve.gateway.identity import OpenIdentity
from twinkle_serve.testing.models import build_tiny_qwen3_moe

COUNTS = (1, 2, 4, 8, 16)
TOKENS = 64
WEIGHTS = (1.0, 2.0, 4.0)
KEYS = [f"tml-weighted-{number}" for number in range(len(WEIGHTS))]
NUM_IDLE = 1000
IDLE_KEYS = 8


def run(rows: Rows, budget: Budget, models: Path) -> None:
    directory = build_tiny_qwen3_moe(models, vocab_size=350)
    sharing(rows, budget, directory)
    weighted(rows, budget, directory)
    idle_runs(rows, budget, directory)


def sharing(rows: Rows, budget: Budget, directory: Path) -> None:
    """Server CPU per step, and fairness, as tenants become more; each sends a step when its last is
    answered."""
    counts = (1, 2) if budget.quick else COUNTS
    room = {"max_resident_adapters": max(counts)}
    with (
        our_server(directory, model=room, settings=BEHIND_HAPROXY) as server,
        clients_of(server.url, MODEL, log=server.scratch / "client") as clients,
    ):
        clients.open(max(counts))
        clients.train(range(max(counts)), tokens=TOKENS, depth=1, steps=2 if budget.quick else 10)
        # Each arm takes about as long, whatever its number of tenants.
        arms: dict[str, Callable[[], Any]] = {
            str(n): lambda n=n: _measured(clients, server, n, 0.5 if budget.quick else 2.0) for n in counts
        }
        found = in_turn(arms, rounds=1 if budget.quick else 8, seconds=budget.share(0.35), min_rounds=1)
    alone = [each["cpu"] for each in found["1"]]
    parts = {count: typical(found[str(count)], "parts") for count in counts}
    for count in counts:
        used = [each["cpu"] for each in found[str(count)]]
        rows.add(
            f"server CPU a step, {count} x {TOKENS} tokens, over one tenant's",
            ratio(used, alone),
            target="<= 0.5" if count == 8 else "",
            why=f"CPU of a step of one tenant: {in_ms(parts[1])}; with {count}: {in_ms(parts[count])}; "
            "each tenant's step is four requests, whatever the others do",
            cpu={"server s/step": statistics.median(used)}
            | {f"{part} s/step": seconds for part, seconds in parts[count].items()},
            detail={
                "tokens/s": statistics.median(each["tokens_per_s"] for each in found[str(count)]),
                "rounds": len(used),
            },
        )
    most = found[str(max(counts))]
    shares = [sum(each["steps"][number] for each in most) for number in range(max(counts))]
    rows.add(
        f"Jain fairness of {max(counts)} equal tenants", jain(shares), "", ">= 0.95", detail={"steps": shares}
    )


def _measured(clients: Clients, server: Service, count: int, seconds: float) -> dict[str, Any]:
    before = server.clock.by_part()
    answer = clients.train(range(count), tokens=TOKENS, depth=1, seconds=seconds)
    steps = [tenant["steps"] for tenant in answer["tenants"]]
    parts = server.clock.since(before, sum(steps))
    return {
        "cpu": sum(parts.values()),
        "parts": parts,
        "steps": steps,
        "tokens_per_s": TOKENS * sum(steps) / answer["wall"],
    }


def weighted(rows: Rows, budget: Budget, directory: Path) -> None:
    """Three tenants that always have more waiting than a tick takes; tokens by the end, after a first part in
    which the queues fill."""
    names = tenant_ids(KEYS)
    limits = {name: {"weight": weight} for name, weight in zip(names, WEIGHTS, strict=True)}
    # Steps large enough for the engine to be the limit, so that no client falls behind.
    tokens, seconds = 2048, 2.0 if budget.quick else budget.share(0.25)
    with (
        our_server(
            directory,
            # One run's pass a tick: only the order of turns decides who gets how much.
            model={"planner": {"tick_tokens": tokens, "company_wait_ms": 0.0}},
            settings={"limits": {"tenants": limits}},
        ) as server,
        clients_of(server.url, MODEL, log=server.scratch / "client") as clients,
    ):
        clients.open(len(KEYS), keys=KEYS)
        answer = clients.train(range(len(KEYS)), tokens=tokens, depth=16, seconds=seconds)
    # What is in flight at the end is drained without competition, so it does not count.
    got = [sum(0.3 * seconds < end < seconds for end in tenant["ends"]) for tenant in answer["tenants"]]
    if not all(got):
        rows.add("weighted shares", None, failed=True, note=f"somebody got nothing: {got}")
        return
    rows.add(
        f"weighted shares {WEIGHTS}: largest deviation from what is due",
        100 * worst_deviation(got, WEIGHTS),
        "%",
        "<= 10",
        why=f"steps that each got: {got}; one whose client falls behind has nothing waiting for its turns",
        detail={"steps": got, "weights": list(WEIGHTS)},
    )


def tenant_ids(keys: list[str]) -> list[str]:
    """What an open server calls the owners of these keys."""
    identity = OpenIdentity()
    return [asyncio.run(identity.identify({"x-api-key": key})).tenant for key in keys]


def idle_runs(rows: Rows, budget: Budget, directory: Path) -> None:
    """Two equal servers; one also keeps runs that nobody uses. One tenant steps on each in turn."""
    each = 2 if budget.quick else NUM_IDLE // IDLE_KEYS
    count = each * IDLE_KEYS
    settings = {"limits": {"tenant": {"live_runs": 4 * NUM_IDLE}}}
    with (
        our_server(directory, settings=settings) as busy,
        our_server(directory) as empty,
        clients_of(busy.url, MODEL, log=busy.scratch / "client") as on_busy,
        clients_of(empty.url, MODEL, log=empty.scratch / "client") as on_empty,
        clients_of(busy.url, MODEL, log=busy.scratch / "idle") as idle,
    ):
        for clients in (on_busy, on_empty):
            clients.open(1)
        idle.open(IDLE_KEYS)
        idle.more(range(IDLE_KEYS), each - 1)
        steps = 3 if budget.quick else 15
        arms: dict[str, Callable[[], Any]] = {
            "idle runs": lambda: _one_step(on_busy, busy, steps),
            "none": lambda: _one_step(on_empty, empty, steps),
        }
        found = in_turn(arms, rounds=1 if budget.quick else 20, seconds=budget.share(0.2), min_rounds=1)
    rows.add(
        f"step time beside {count} idle runs, over none",
        ratio([each["wall"] for each in found["idle runs"]], [each["wall"] for each in found["none"]]),
        target="<= 1.05",
        why=f"CPU of a step: {in_ms(typical(found['idle runs'], 'parts'))}; beside none: "
        f"{in_ms(typical(found['none'], 'parts'))}",
        cpu={
            "ratio": ratio(
                [each["cpu"] for each in found["idle runs"]], [each["cpu"] for each in found["none"]]
            )
        },
        detail={name: statistics.median(each["wall"] for each in of) for name, of in found.items()},
    )


def _one_step(clients: Clients, server: Service, steps: int) -> dict[str, Any]:
    before = server.clock.by_part()
    answer = clients.train([0], tokens=512, depth=1, steps=steps)
    parts = server.clock.since(before, steps)
    return {
        "wall": statistics.median(answer["tenants"][0]["step"]),
        "cpu": sum(parts.values()),
        "parts": parts,
    }
