"""Part of ``make bench-sampling``: 512 samples at once through the SDK and a real server, and how long
heartbeats from another process take meanwhile.

The model is tiny, so what is measured is everything around it: HTTP, Ray Serve, the coordinator, the SDK.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import tempfile
import time
from pathlib import Path

from benchmarks.common import Report
from tests.e2e.test_sampling_load import NUM_SAMPLES, draw_all, heartbeats
from twinkle_serve.testing.models import build_tiny_llama
from twinkle_serve.testing.server import running_server

AIM_S = 0.5
QUIET_S = 5.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", type=Path, default=Path("models"))
    model = build_tiny_llama(parser.parse_args().models, tie_word_embeddings=True)
    report = Report("load")
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        tree = {
            "models": [{"name": "llama", "path": str(model), "num_threads": 1, "device": "cpu"}],
            "storage": {"root": str(directory / "store")},
        }
        (directory / "config.yaml").write_text(json.dumps(tree))
        with running_server(directory / "config.yaml", log=directory / "server.log") as server:
            with heartbeats(server.url) as undisturbed:
                time.sleep(QUIET_S)
            began = time.perf_counter()
            with heartbeats(server.url) as latencies:
                asyncio.run(draw_all(server.url))
            seconds = time.perf_counter() - began
    report.row(f"{NUM_SAMPLES} samples: {AIM_S} s over a heartbeat's p99", AIM_S / p99(latencies), ">= 1")
    report.row("a heartbeat's p99 before them over that beside them", p99(undisturbed) / p99(latencies))
    median = latencies[len(latencies) // 2]
    print(f"    {seconds:.1f} s in all; heartbeats: median {1000 * median:.0f} ms", end="")
    print(f", p99 {1000 * p99(latencies):.0f} ms; {1000 * p99(undisturbed):.0f} ms with nobody else there")
    report.write()


def p99(ordered: list[float]) -> float:
    return ordered[int(0.99 * (len(ordered) - 1))]


if __name__ == "__main__":
    main()
