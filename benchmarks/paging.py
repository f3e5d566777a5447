"""Part of ``make bench-engine``: thousands of registered runs on eight slots.

Reports what the runs that are not resident cost in memory of the engine's process, and how long it takes to
create a run when another one has to make room. Pages go to disk at once, which is the slowest case.
"""

from __future__ import annotations

import argparse
import gc
import time
from pathlib import Path

import numpy as np
import psutil

from benchmarks.common import Report
from twinkle_serve.config import ModelConfig
from twinkle_serve.engine.engine import Engine
from twinkle_serve.protocol.data import LoraSpec
from twinkle_serve.protocol.work import CreateAdapter, PageOut, Tick
from twinkle_serve.testing.models import build_tiny_qwen3_moe

SLOTS = 8
RANK = 32


def resident_bytes() -> int:
    gc.collect()
    return int(psutil.Process().memory_info().rss)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", type=Path, default=Path("models"))
    parser.add_argument("--runs", type=int, default=2000)
    arguments = parser.parse_args()
    directory = build_tiny_qwen3_moe(arguments.models, vocab_size=350)
    config = ModelConfig(name="bench", path=str(directory), max_resident_adapters=SLOTS, host_page_bytes=0)
    engine = Engine(config)
    report = Report("paging")
    seconds = []
    with_resident = 0
    for number in range(arguments.runs):
        slot = number % SLOTS
        moves = (PageOut(slot, f"run-{number - SLOTS}"),) if number >= SLOTS else ()
        create = CreateAdapter("create", f"run-{number}", slot, LoraSpec(RANK, seed=number))
        started = time.perf_counter()
        list(engine.run(Tick(number, page_out=moves, creates=(create,))))
        seconds.append(time.perf_counter() - started)
        if number == 2 * SLOTS:
            with_resident = resident_bytes()
    ratio = resident_bytes() / with_resident
    report.row(f"memory with {arguments.runs} runs over memory with {SLOTS} resident", ratio, "<= 1.2")
    report.row("creating a run, p95, seconds", float(np.quantile(seconds, 0.95)), "< 0.2")
    report.write()
    engine.close()


if __name__ == "__main__":
    main()
