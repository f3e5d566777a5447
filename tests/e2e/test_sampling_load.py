"""512 concurrent samples through the real SDK: none is lost, and heartbeats are answered meanwhile.

The heartbeats' latency goes into the log only: how fast a shared machine is, is no matter of right and wrong.
"""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import tinker
from tinker import types

from twinkle_serve.testing.server import RunningServer

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]
NUM_SAMPLES = 512
KEY = "tml-load"


@contextmanager
def heartbeats(url: str) -> Iterator[list[float]]:
    """Seconds that each heartbeat took while the block lasted, sorted; filled when it ends."""
    latencies: list[float] = []
    command = [sys.executable, str(Path(__file__).parent / "heartbeats.py"), url, KEY]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "beating\n"
        yield latencies
        said, _ = process.communicate()
        latencies += sorted(json.loads(said))


async def draw_all(url: str) -> list[Any]:
    """One greedy and seeded prompt each; in the order of the requests."""
    service = tinker.ServiceClient(base_url=url, api_key=KEY)
    sampler = await service.create_sampling_client_async(base_model="llama")

    async def one(number: int) -> Any:
        params = types.SamplingParams(max_tokens=8 + number % 9, seed=number, temperature=1.0, stop=[])
        prompt = types.ModelInput.from_ints([5 + number % 300, 9, 11 + number % 7])
        return await sampler.sample_async(prompt, 1, params)

    results = await asyncio.gather(*(one(number) for number in range(NUM_SAMPLES)))
    await service.close("success")
    return results


async def test_512_samples_at_once_and_heartbeats_meanwhile(
    server: RunningServer, record_property: Callable[[str, object], None]
) -> None:
    began = time.perf_counter()
    with heartbeats(server.url) as latencies:
        results = await draw_all(server.url)
    seconds = time.perf_counter() - began
    for number, result in enumerate(results):
        (sequence,) = result.sequences
        assert len(sequence.tokens) == len(sequence.logprobs) == 8 + number % 9
    p99 = latencies[int(0.99 * (len(latencies) - 1))]
    median = latencies[len(latencies) // 2]
    print(f"{NUM_SAMPLES} samples in {seconds:.1f} s; {len(latencies)} heartbeats: ", end="")
    print(f"median {1000 * median:.0f} ms, p99 {1000 * p99:.0f} ms")
    record_property("heartbeat_p99_ms", 1000 * p99)
