"""``make bench``: every part in a process of its own with a time budget, one table, one JSON file, plots.

Knows the parts, their budgets and that a part may fail or hang without spoiling the others. Does not know
what they measure. ``--quick`` shows in a few minutes that each part works; its figures mean nothing.
"""

from __future__ import annotations

import argparse
import importlib
import os
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from pathlib import Path

from benchmarks.measure import Budget, end_tree
from benchmarks.table import Row, Rows, read_rows, write

HERE = Path(__file__).parent
# Seconds that a part plans with; a busy machine may need more, and there is an end to that.
PARTS = {
    "tax": 180.0,
    "twinkle": 110.0,
    "skyrl": 230.0,
    "tenancy": 120.0,
    "control": 110.0,
    "sweep": 110.0,
    "scale": 60.0,
    "engine": 60.0,
    "sampling": 50.0,
}
QUICK_S = 60.0
_PATIENCE = 1.5
_START_S = 120.0
MODULES = {name: f"benchmarks.{name}" for name in PARTS} | {
    "twinkle": "benchmarks.side_by_side",
    "skyrl": "benchmarks.side_by_side",
    "control": "benchmarks.control_plane",
    "engine": "benchmarks.others",
    "sampling": "benchmarks.others",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """0 unless a part failed."""
    options = _parser().parse_args(arguments)
    if options.inside:
        return run_part(options.inside, options)
    began = time.monotonic()
    found: list[Row] = []
    with tempfile.TemporaryDirectory() as name:
        for part in options.only or PARTS:
            found += _in_own_process(part, options, Path(name) / f"{part}.jsonl")
    minutes = (time.monotonic() - began) / 60
    print(f"{sum(row.value is not None for row in found)} figures in {minutes:.1f} minutes")
    path = write(found, options.results, quick=options.quick, minutes=round(minutes, 1))
    print(f"wrote {path}")
    from benchmarks.plots import draw

    for picture in draw(found, path.with_suffix("")):
        print(f"wrote {picture}")
    return int(any(row.failed for row in found))


def run_part(part: str, options: argparse.Namespace) -> int:
    """In the part's own process."""
    rows = Rows(part, options.rows)
    budget = Budget.of(QUICK_S if options.quick else PARTS[part] * options.scale, options.quick)
    module = importlib.import_module(MODULES[part])
    run = getattr(module, f"run_{part}", None) or module.run
    try:
        run(rows, budget, options.models)
    except Exception as error:
        traceback.print_exc()
        last = (str(error).strip().splitlines() or [""])[-1]
        rows.add(f"the rest of {part}", None, failed=True, note=f"{type(error).__name__}: {last}"[:300])
    return 0


def _in_own_process(part: str, options: argparse.Namespace, path: Path) -> list[Row]:
    print(f"== {part} (load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores)", flush=True)
    command = [
        sys.executable,
        "-W",
        "ignore",
        "-m",
        "benchmarks.suite",
        "--inside",
        part,
        "--rows",
        str(path),
    ]
    command += ["--models", str(options.models), "--scale", str(options.scale)]
    command += ["--quick"] if options.quick else []
    environment = os.environ | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}
    limit = (QUICK_S if options.quick else PARTS[part] * options.scale) * _PATIENCE + _START_S
    began = time.monotonic()
    process = subprocess.Popen(command, cwd=HERE.parent, env=environment)
    try:
        code = process.wait(limit)
        late = False
    except subprocess.TimeoutExpired:
        code, late = 1, True
        end_tree(process)
    print(f"   {time.monotonic() - began:.0f} s", flush=True)
    found = read_rows(path)
    if code:
        why = f"ended after {limit:.0f} s" if late else f"its process ended with {code}"
        found.append(Row(part, f"the rest of {part}", None, failed=True, note=why))
        print(f"  {part}: {why}")
    return found


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.suite", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="only show that every part works")
    parser.add_argument("--only", nargs="+", choices=list(PARTS), help="parts to run")
    parser.add_argument("--models", type=Path, default=Path("models"), help="where small models are built")
    parser.add_argument("--results", type=Path, default=HERE / "results")
    parser.add_argument("--scale", type=float, default=1.0, help="times the time budget of each part")
    parser.add_argument("--inside", choices=list(PARTS), help=argparse.SUPPRESS)
    parser.add_argument("--rows", type=Path, help=argparse.SUPPRESS)
    return parser


if __name__ == "__main__":
    sys.exit(main())
