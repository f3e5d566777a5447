"""Part ``sweep``: eight learning rates of one job, all at once on one server, and as eight processes one
after another. Each side pays for its start: Ray, Serve and one model load here, eight interpreters and loads
there.
"""

from __future__ import annotations

import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.clients import clients_of
from benchmarks.measure import Budget
from benchmarks.services import MODEL, our_server
from benchmarks.table import Rows
from twinkle_serve.testing.models import build_bench_moe, build_tiny_qwen3_moe

RATES = [1e-5 * 2**power for power in range(8)]
TOKENS = 256
STEPS = 10
JOB = Path(__file__).with_name("peft_job.py")


def run(rows: Rows, budget: Budget, models: Path) -> None:
    """The two arms take turns once: each is long, and ours runs between halves of theirs."""
    directory = build_tiny_qwen3_moe(models, vocab_size=350) if budget.quick else build_bench_moe(models)
    rates, steps = (RATES[:2], 2) if budget.quick else (RATES, STEPS)
    half = len(rates) // 2
    apart = [job(directory, rate, steps) for rate in rates[:half]]
    ours = at_once(directory, rates, steps)
    apart += [job(directory, rate, steps) for rate in rates[half:]]
    theirs = sum(each["wall"] for each in apart)
    rows.add(
        f"{len(rates)} learning rates, {steps} x {TOKENS} tokens: processes in turn over all at once",
        theirs / ours["wall"],
        target=">= 1",
        cpu={"processes s": sum(each["cpu"] for each in apart), "service s": ours["cpu"]},
        detail={
            "processes s": theirs,
            "a process, median s": statistics.median(each["wall"] for each in apart),
            **{name: value for name, value in ours.items() if name != "cpu"},
        },
        note="start and model load included on both sides",
    )
    rows.add(
        f"{len(rates)} learning rates on a server that runs already: processes in turn over all at once",
        theirs / ours["training s"],
    )


def job(directory: Path, rate: float, steps: int) -> dict[str, float]:
    """One process from start to end."""
    used, began = _children_cpu(), time.perf_counter()
    command = [sys.executable, "-W", "ignore", str(JOB), str(directory), str(rate), str(steps), str(TOKENS)]
    subprocess.run(command, check=True, capture_output=True)
    return {"wall": time.perf_counter() - began, "cpu": _children_cpu() - used}


def at_once(directory: Path, rates: list[float], steps: int) -> dict[str, Any]:
    """From starting the server to the last answer."""
    began = time.perf_counter()
    vocabulary = 350
    with our_server(directory, model={"max_resident_adapters": len(rates)}) as server:
        ready = time.perf_counter()
        options: dict[str, Any] = {"log": server.scratch / "client", "vocabulary": vocabulary}
        with clients_of(server.url, MODEL, **options) as clients:
            clients.open(len(rates))
            tenants = range(len(rates))
            answer = clients.train(tenants, tokens=TOKENS, depth=2, steps=steps, rates=rates)
        ended = time.perf_counter()
        return {
            "wall": ended - began,
            "start s": ready - began,
            "training s": ended - ready,
            "cpu": server.clock.seconds() + answer["cpu"],
        }


def _children_cpu() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime
