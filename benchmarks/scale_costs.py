"""The costs that ``scale.py`` calculates with, measured here and now: the 49M-parameter mixture of experts,
rank 8, on one CPU thread. Knows the engine. Another machine or model is another set of numbers, not another
method.
"""

from __future__ import annotations

from pathlib import Path

import torch

from benchmarks.common import interleave
from benchmarks.engine import Tenants
from benchmarks.measure import Budget
from benchmarks.scale import Costs
from twinkle_serve.protocol.work import PageIn, PageOut, Tick
from twinkle_serve.testing.models import build_bench_moe, build_tiny_qwen3_moe

Source = tuple[str, float, str]
RUNS = 8
FEW, MANY = 64, 1024


def measured(models: Path, budget: Budget) -> tuple[Costs, list[Source]]:
    """The costs, and for each its name, its value and how it was found."""
    torch.set_num_threads(1)
    directory = build_tiny_qwen3_moe(models, vocab_size=350) if budget.quick else build_bench_moe(models)
    tenants = Tenants(directory, RUNS)
    few = [tenants.batch(FEW) for _ in range(RUNS)]
    many = [tenants.batch(MANY)]
    slots = list(range(RUNS))
    tenants.step(slots, few)  # moments exist from the first step on, and are paged too
    state = tenants.engine.pool.state(0)
    times = interleave(
        {
            "one run": lambda: tenants.step([0], few),
            "all runs": lambda: tenants.step(slots, few),
            "many tokens": lambda: tenants.step([0], many),
            "page": lambda: _page(tenants),
        },
        rounds=1 if budget.quick else 5,
    )
    one, every, long = (times[name].cpu for name in ("one run", "all runs", "many tokens"))
    fixed_s, run_s, token_s = solve(one, every, long)
    packed = many[0].pack()
    costs = Costs(
        fixed_s=fixed_s,
        run_s=run_s,
        token_s=token_s,
        page_s=times["page"].cpu,
        page_bytes=float(state.num_bytes()),
        journal_bytes_per_token=len(packed) / MANY,
    )
    how = f"CPU time of ticks of 1 x {FEW}, {RUNS} x {FEW}, 1 x {MANY} tokens, solved for three unknowns"
    return costs, [
        ("fixed_s", fixed_s, how),
        ("run_s", run_s, how),
        ("token_s", token_s, how),
        ("page_s", costs.page_s, "CPU time of one adapter out and in again, to host memory, median"),
        ("page_bytes", costs.page_bytes, "weights, gradients and moments of one rank-8 run"),
        ("journal_bytes_per_token", costs.journal_bytes_per_token, f"packed batch of {MANY} tokens"),
    ]


def solve(one: float, every: float, long: float) -> tuple[float, float, float]:
    """Seconds of a tick, of each run in it and of each token, from the three ticks; none below zero, which
    noise could make of a small one."""
    token_s = max(0.0, (long - one) / (MANY - FEW))
    run_s = max(0.0, (every - one) / (RUNS - 1) - FEW * token_s)
    return max(0.0, one - run_s - FEW * token_s), run_s, token_s


def _page(tenants: Tenants) -> None:
    list(tenants.engine.run(Tick(2, page_out=(PageOut(0, "run-0"),), page_in=(PageIn(0, "run-0"),))))
