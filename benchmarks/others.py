"""Parts ``engine`` and ``sampling``: short forms of the benchmarks that have commands of their own.

Knows how to turn their reports into rows. Does not know what they measure.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

import torch

from benchmarks import engine, sampling
from benchmarks.common import Report, Timings
from benchmarks.measure import Budget
from benchmarks.table import Rows
from twinkle_serve.testing.models import build_tiny_qwen3_moe


class AsReport:
    """Has what ``common.Report`` has, and fills the table."""

    def __init__(self, rows: Rows) -> None:
        self._rows = rows

    def row(
        self, what: str, ratio: float, target: str = "", timings: Timings | None = None, **rest: Any
    ) -> None:
        cpu = {f"{name} s": timing.cpu for name, timing in (timings or {}).items()}
        detail: dict[str, Any] = {name: asdict(timing) for name, timing in (timings or {}).items()}
        self._rows.add(what, ratio, target=target, cpu=cpu, detail=detail, **rest)


def run_engine(rows: Rows, budget: Budget, models: Path) -> None:
    """64 tokens a tenant. ``make bench-engine`` has more sizes."""
    torch.set_num_threads(1)
    report = cast(Report, AsReport(rows))
    if budget.quick:
        engine.measure(report, "tiny MoE", build_tiny_qwen3_moe(models, vocab_size=350), [1, 2], [64])
        return
    for name, directory in engine.models(models).items():
        engine.measure(report, name, directory, [1, 8], [64])


def run_sampling(rows: Rows, budget: Budget, models: Path) -> None:
    """``make bench-sampling`` has a larger model and more rounds."""
    torch.set_num_threads(1)
    report = cast(Report, AsReport(rows))
    tiny = build_tiny_qwen3_moe(models, vocab_size=350)
    sampling.measure(report, "tiny MoE", tiny, 8 if budget.quick else 32, 1 if budget.quick else 3)
