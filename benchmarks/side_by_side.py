"""Parts ``twinkle`` and ``skyrl``: the same program on the same model against another server and against us,
in turn.

Both clients run in the peer's environment, so the SDK is the same. Knows what is compared. Does not know how
a peer is installed, configured or started.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.clients import Clients, clients_of
from benchmarks.measure import Budget, TreeClock, in_turn, ratio
from benchmarks.peers import skyrl, twinkle
from benchmarks.peers.environment import NotInstallable, NotStarted, build_model
from benchmarks.services import BEHIND_HAPROXY, MODEL, our_server
from benchmarks.table import Rows
from twinkle_serve.testing.models import build_tiny_qwen3_moe

COUNTS = (1, 4, 8)
TOKENS = 512
TARGET = ">= 5"
_SHARE = 0.1  # of the part's time: for a row, and for warming up before it
_RECORDED = (
    "recorded on this model, 512 tokens a step, two idle cores: p50 of a step 0.46 s, "
    "1,128 tokens/s with one client and 1,851 with eight, "
    "server CPU a step 436, 440, 440 ms at 1, 4, 8 tenants"
)


@dataclass(slots=True)
class Side:
    """A server with its client program. alone, many: steps of a round with one operation or step at a time,
    and with steps in flight, two at least: speed is that between the first and the last. open: clients so
    far."""

    clients: Clients
    clock: TreeClock
    alone: int
    many: int
    open: int = 0

    def measured(self, count: int, steps: int, depth: int) -> dict[str, Any]:
        used = self.clock.seconds()
        answer = self.clients.train(range(count), tokens=TOKENS, depth=depth, steps=steps)
        return {
            "step": [second for tenant in answer["tenants"] for second in tenant["step"]],
            "tokens_per_s": TOKENS * steps_per_s([tenant["ends"] for tenant in answer["tenants"]]),
            "wall": answer["wall"],
            "cpu": (self.clock.seconds() - used) / (steps * count),
        }


def steps_per_s(ends: Sequence[Sequence[float]]) -> float:
    """Of all clients together, from the times at which each one's steps ended: the steps after each client
    had its first, by the time they took. Up to there the pipeline fills, which says more about a step's
    latency the fewer steps there are, and the sides have not the same number."""
    full = max(each[0] for each in ends)
    after = [end for each in ends for end in each if end > full]
    return len(after) / (max(after) - full)


Sides = Mapping[str, Side]  # the peer, by the name of the part, and "ours"


def run_twinkle(rows: Rows, budget: Budget, models: Path) -> None:
    what = "Twinkle 0.5.1"
    try:
        python = twinkle.ENVIRONMENT.installed()
    except NotInstallable as why:
        rows.skip(f"{what}, latency and throughput at 1, 4, 8 clients", str(why))
        return
    model = _model(python, models)
    with (
        tempfile.TemporaryDirectory(prefix="bench-") as name,
        twinkle.running_twinkle(python, model, Path(name)) as (url, clock),
        clients_of(
            url, twinkle.MODEL, log=Path(name) / "client", python=str(python), twinkle=True
        ) as clients,
        _ours(python, model, budget) as ours,
    ):
        few = 2 if budget.quick else 4
        compare(rows, budget, what, {"twinkle": Side(clients, clock, 2, few), "ours": ours})


def run_skyrl(rows: Rows, budget: Budget, models: Path) -> None:
    what = f"SkyRL ({skyrl.ENVIRONMENT.release})"
    unknown = f"{what}, latency and throughput at 1, 4, 8 clients"
    try:
        python = skyrl.ENVIRONMENT.installed()
    except NotInstallable as why:
        rows.skip(unknown, f"{why}; {_RECORDED}")
        return
    model = _model(python, models)
    try:
        with (
            tempfile.TemporaryDirectory(prefix="bench-") as name,
            skyrl.running_skyrl(python, model, Path(name)) as (url, clock),
            clients_of(url, str(model.resolve()), log=Path(name) / "client", python=str(python)) as clients,
            _ours(python, model, budget) as ours,
        ):
            compare(rows, budget, what, {"skyrl": Side(clients, clock, 2, 3), "ours": ours}, compiles=True)
    except NotStarted:
        rows.skip(unknown, f"it did not start; {_RECORDED}")
        raise


def compare(rows: Rows, budget: Budget, what: str, sides: Sides, *, compiles: bool = False) -> None:
    """compiles: the peer compiles for each shape of batch that it meets."""
    counts = [1, 2] if budget.quick else COUNTS
    open_clients(sides, 1)
    theirs = next(iter(sides.values())) if compiles else None
    for name, depth in (("one operation at a time", 0), ("both sent, then awaited", 1)):
        detail = warm_up(theirs, 1, depth, budget) if theirs else {}
        row = f"{what}: its time for a step over ours, p50, one client, {name}"
        latency(rows, budget, row, sides, depth, detail)
    for count in counts:
        open_clients(sides, count)
        detail = warm_up(theirs, count, 2, budget) if theirs else {}
        throughput(rows, budget, what, sides, count, detail)


def open_clients(sides: Sides, count: int) -> None:
    """As many as are missing. They make two steps before any that counts: the first ones load and
    allocate."""
    for side in sides.values():
        if side.open < count:
            side.clients.open(count - side.open)
            side.clients.train(range(count), tokens=TOKENS, depth=1, steps=2)
            side.open = count


def warm_up(side: Side, count: int, depth: int, budget: Budget) -> dict[str, Any]:
    """Rounds until they are steady or their time is over; what a row's detail says of it."""
    until = time.monotonic() + budget.share(_SHARE)
    speeds: list[float] = []
    while not steady(speeds) and time.monotonic() < until:
        # Of the whole round: its first step is where a compilation would be.
        speeds.append(1 / side.measured(count, side.alone, depth)["wall"])
    return {"rounds to warm up": len(speeds), "steady after them": steady(speeds)}


def standing(detail: Mapping[str, Any], target: str) -> dict[str, str]:
    """Target and note of a row: what was measured before the peer was steady reaches nothing."""
    if detail.get("steady after them", True):
        return {"target": target}
    rounds = detail["rounds to warm up"]
    return {"note": f"the peer was not steady yet (rounds to warm up: {rounds}) and may have been compiling"}


def steady(speeds: Sequence[float]) -> bool:
    """Whether the last three were near the best. A round with a compilation is many times slower; three in a
    row that all have one would be taken for steady."""
    return len(speeds) >= 3 and min(speeds[-3:]) > 0.6 * max(speeds)


def latency(
    rows: Rows, budget: Budget, what: str, sides: Sides, depth: int, detail: Mapping[str, Any]
) -> None:
    """One client. depth 0 awaits forward_backward before it sends optim_step; depth 1 sends both first."""
    arms: dict[str, Callable[[], Any]] = {
        name: lambda side=side: side.measured(1, side.alone, depth) for name, side in sides.items()
    }
    found = in_turn(arms, rounds=1 if budget.quick else 8, seconds=budget.share(_SHARE), min_rounds=1)
    waits = {name: [s for each in of for s in each["step"]] for name, of in found.items()}
    theirs, ours = waits.values()
    rows.add(
        what,
        ratio(theirs, ours),
        **standing(detail, TARGET),
        cpu=_cpu_of(found),
        detail={f"{name} p50 s": statistics.median(times) for name, times in waits.items()}
        | {f"{name} steps": len(times) for name, times in waits.items()}
        | detail,
    )


def throughput(
    rows: Rows, budget: Budget, what: str, sides: Sides, count: int, detail: Mapping[str, Any]
) -> None:
    """Each client keeps two steps in flight."""
    arms: dict[str, Callable[[], Any]] = {
        name: lambda side=side: side.measured(count, side.many, 2) for name, side in sides.items()
    }
    found = in_turn(arms, rounds=1 if budget.quick else 6, seconds=budget.share(_SHARE), min_rounds=1)
    speeds = {name: [each["tokens_per_s"] for each in of] for name, of in found.items()}
    used = _cpu_of(found)
    theirs, ours = speeds
    rows.add(
        f"tokens/s over {what}'s, {count} clients at once",
        ratio(speeds[ours], speeds[theirs]),
        **standing(detail, TARGET if count in (1, 8) else ""),
        cpu=used,
        detail={f"{name} tokens/s": statistics.median(of) for name, of in speeds.items()} | detail,
    )
    rows.add(
        f"{what}: its server CPU a step over ours, {count} clients at once",
        used[f"{theirs} s/step"] / used[f"{ours} s/step"],
        **standing(detail, ""),
        cpu=used,
    )


def _cpu_of(found: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, float]:
    return {f"{name} s/step": statistics.median(each["cpu"] for each in of) for name, of in found.items()}


def _model(python: Path, models: Path) -> Path:
    return build_model(python, build_tiny_qwen3_moe(models, vocab_size=350), models / "bench-both")


@contextmanager
def _ours(python: Path, model: Path, budget: Budget) -> Iterator[Side]:
    with (
        our_server(model, settings=BEHIND_HAPROXY) as server,
        clients_of(server.url, MODEL, log=server.scratch / "client", python=str(python)) as clients,
    ):
        yield Side(clients, server.clock, *((2, 2) if budget.quick else (10, 12)))
