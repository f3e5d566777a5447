"""Part ``twinkle``: the same program on the same model against Twinkle 0.5.1 and against us, in turn.

Both clients run Twinkle's environment, so the SDK (0.16.1, the newest that it works with) is the same.
SkyRL's server is not run: a row has what was recorded of it.
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.clients import Clients, clients_of
from benchmarks.measure import Budget, TreeClock, in_turn, ratio
from benchmarks.peers import twinkle
from benchmarks.services import BEHIND_HAPROXY, MODEL, our_server
from benchmarks.table import Rows
from twinkle_serve.testing.models import build_tiny_qwen3_moe

COUNTS = (1, 4, 8)
TOKENS = 512
TARGET = ">= 5"
_WHAT = "Twinkle 0.5.1"


_RECORDED = (
    "not run here; recorded on this model, 512 tokens a step, two idle cores: p50 of a step 0.46 s, "
    "1,128 tokens/s with one client and 1,851 with eight, "
    "server CPU a step 436, 440, 440 ms at 1, 4, 8 tenants"
)


def run(rows: Rows, budget: Budget, models: Path) -> None:
    rows.skip("SkyRL's tinker server", _RECORDED)
    try:
        python = twinkle.installed()
    except twinkle.NotInstallable as why:
        rows.skip(f"{_WHAT}, latency and throughput at 1, 4, 8 clients", str(why))
        return
    tokenizer = build_tiny_qwen3_moe(models, vocab_size=350)
    model = twinkle.build_model(python, tokenizer, models / "bench-both")
    with (
        tempfile.TemporaryDirectory(prefix="bench-") as name,
        twinkle.running_twinkle(python, model, Path(name)) as (their_url, their_clock),
        our_server(model, settings=BEHIND_HAPROXY) as ours,
        clients_of(
            their_url, twinkle.MODEL, log=Path(name) / "client", python=str(python), twinkle=True
        ) as their_clients,
        clients_of(ours.url, MODEL, log=ours.scratch / "client", python=str(python)) as our_clients,
    ):
        sides = {"twinkle": (their_clients, their_clock), "ours": (our_clients, ours.clock)}
        most = 2 if budget.quick else max(COUNTS)
        for clients, _ in sides.values():
            clients.open(most)
            clients.train(range(most), tokens=TOKENS, depth=1, steps=2)
        latency(rows, budget, sides)
        throughput(rows, budget, sides, [n for n in COUNTS if n <= most])


def latency(rows: Rows, budget: Budget, sides: dict[str, tuple[Clients, TreeClock]]) -> None:
    """One client. depth 0 awaits forward_backward before it sends optim_step; depth 1 sends both first."""
    for name, depth in (("one operation at a time", 0), ("both sent, then awaited", 1)):
        steps = {"twinkle": 2, "ours": 2 if budget.quick else 10}
        arms: dict[str, Callable[[], Any]] = {
            side: lambda c=clients, k=clock, n=steps[side], d=depth: _measured(c, k, 1, n, d)
            for side, (clients, clock) in sides.items()
        }
        found = in_turn(arms, rounds=1 if budget.quick else 8, seconds=budget.share(0.12), min_rounds=1)
        waits = {side: [s for each in of for s in each["step"]] for side, of in found.items()}
        rows.add(
            f"{_WHAT}: its time for a step over ours, p50, one client, {name}",
            ratio(waits["twinkle"], waits["ours"]),
            target=TARGET,
            cpu={
                f"{side} s/step": statistics.median(each["cpu"] for each in of) for side, of in found.items()
            },
            detail={f"{side} p50 s": statistics.median(times) for side, times in waits.items()}
            | {f"{side} steps": len(times) for side, times in waits.items()},
        )


def throughput(
    rows: Rows, budget: Budget, sides: dict[str, tuple[Clients, TreeClock]], counts: list[int]
) -> None:
    """Each client keeps two steps in flight."""
    for count in counts:
        steps = {"twinkle": 2 if budget.quick else 4, "ours": 2 if budget.quick else 12}
        arms: dict[str, Callable[[], Any]] = {
            side: lambda c=clients, k=clock, n=steps[side], m=count: _measured(c, k, m, n, 2)
            for side, (clients, clock) in sides.items()
        }
        found = in_turn(arms, rounds=1 if budget.quick else 6, seconds=budget.share(0.12), min_rounds=1)
        speeds = {side: [each["tokens_per_s"] for each in of] for side, of in found.items()}
        rows.add(
            f"tokens/s over {_WHAT}'s, {count} clients at once",
            ratio(speeds["ours"], speeds["twinkle"]),
            target=TARGET if count in (1, 8) else "",
            cpu={
                f"{side} s/step": statistics.median(each["cpu"] for each in of) for side, of in found.items()
            },
            detail={f"{side} tokens/s": statistics.median(of) for side, of in speeds.items()},
        )


def _measured(clients: Clients, clock: TreeClock, count: int, steps: int, depth: int) -> dict[str, Any]:
    used = clock.seconds()
    answer = clients.train(range(count), tokens=TOKENS, depth=depth, steps=steps)
    return {
        "step": [second for tenant in answer["tenants"] for second in tenant["step"]],
        "tokens_per_s": TOKENS * steps * count / answer["wall"],
        "cpu": (clock.seconds() - used) / (steps * count),
    }
