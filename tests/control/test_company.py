"""Recipe traffic through the whole control plane: do clients that could share passes share them?"""

from __future__ import annotations

import asyncio
import random

import pytest

from tests.control.echo_group import EchoGroup, pass_command
from tests.control.plane import Client, control_plane, make_config, optim
from tests.control.virtual_time import run

STEPS = 40


async def traffic(root, num_clients: int, wait_ms: float, think_s: tuple[float, float], pipelined: bool):
    """Clients that each train STEPS steps; passes per tick with passes, and virtual seconds."""
    rng = random.Random(num_clients)
    group = EchoGroup(max_slots=32, pass_s=0.05)
    group.token_s = 2e-4

    async def train(plane, number: int) -> None:
        client = await Client(plane, f"tenant {number}").open()
        run_id = await client.create()
        await asyncio.sleep(rng.uniform(0, 0.5))
        for n in range(STEPS):
            forward_backward = await client.submit(run_id, 2 * n + 1, pass_command("p", 64))
            if not pipelined:
                await client.result(forward_backward)
            await asyncio.sleep(rng.uniform(*think_s) if not pipelined else 0.002)
            await client.do(run_id, 2 * n + 2, optim())
            await asyncio.sleep(rng.uniform(*think_s))

    async with control_plane(root, group, make_config(company_wait_ms=wait_ms)) as plane:
        started = asyncio.get_running_loop().time()
        await asyncio.gather(*(train(plane, number) for number in range(num_clients)))
        seconds = asyncio.get_running_loop().time() - started
    passes = [len(tick.passes) for tick in group.ticks if tick.passes]
    assert sum(passes) == num_clients * STEPS
    return sum(passes) / len(passes), seconds


@pytest.mark.parametrize("num_clients", [2, 4, 8, 16])
def test_clients_that_come_back_within_the_wait_merge(tmp_path, num_clients):
    merged, seconds = run(traffic(tmp_path / "with", num_clients, 25, (0.001, 0.020), True))
    apart, seconds_apart = run(traffic(tmp_path / "without", num_clients, 0, (0.001, 0.020), True))
    assert merged > 0.8 * num_clients
    assert apart < 0.6 * num_clients
    assert seconds < 0.93 * seconds_apart


@pytest.mark.parametrize("num_clients", [4, 8])
def test_clients_that_wait_for_each_answer_merge_more_with_company(tmp_path, num_clients):
    merged, seconds = run(traffic(tmp_path / "with", num_clients, 25, (0.001, 0.020), False))
    apart, seconds_apart = run(traffic(tmp_path / "without", num_clients, 0, (0.001, 0.020), False))
    assert merged > 1.3 * apart
    assert seconds < seconds_apart


def test_a_lone_client_loses_nothing(tmp_path):
    assert run(traffic(tmp_path / "with", 1, 25, (0.001, 0.020), True)) == run(
        traffic(tmp_path / "without", 1, 0, (0.001, 0.020), True)
    )


def test_slow_clients_lose_next_to_nothing(tmp_path):
    _, seconds = run(traffic(tmp_path / "with", 10, 25, (0.5, 1.0), True))
    _, seconds_apart = run(traffic(tmp_path / "without", 10, 0, (0.5, 1.0), True))
    assert seconds < 1.03 * seconds_apart
