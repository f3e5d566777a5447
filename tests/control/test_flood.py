"""One tenant floods, four are modest: what the modest ones notice, in virtual time and so without chance."""

from __future__ import annotations

import asyncio
import statistics
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.control.echo_group import EchoGroup, pass_command
from tests.control.plane import Client, control_plane, make_config, optim
from tests.control.virtual_time import virtual
from twinkle_serve.config import Config, LimitsConfig
from twinkle_serve.protocol.errors import Busy

NUM_FLOOD_RUNS, NUM_FLOOD_PASSES, NUM_FLOOD_SAMPLES = 4, 40, 40
MODEST_TOKENS, FLOOD_TOKENS = 8, 600


@dataclass
class Flood:
    """Sends all it can, and what is refused again after a second, as the SDK does."""

    plane: Any
    refusals: int = 0
    results: list[Any] = field(default_factory=list)

    async def go(self) -> None:
        client = await Client(self.plane, "flood").open()
        runs = [await client.create(number) for number in range(NUM_FLOOD_RUNS)]
        sampler = await self.plane.create_sampler("flood", client.session, 99, "base", None)
        beating = asyncio.create_task(self._beat(client))
        await asyncio.gather(
            *(self._train(client, run) for run in runs),
            *(self._sample(client, sampler, seq_id) for seq_id in range(NUM_FLOOD_SAMPLES)),
        )
        beating.cancel()

    async def _beat(self, client: Client) -> None:
        while await self.plane.heartbeat("flood", client.session):
            await asyncio.sleep(60)

    async def _train(self, client: Client, run: str) -> None:
        pending = []
        for seq_id in range(1, NUM_FLOOD_PASSES + 1):
            command = pass_command(f"{seq_id}", FLOOD_TOKENS)
            request = await self._accepted(lambda n=seq_id, c=command: client.submit(run, n, c))
            pending.append(asyncio.create_task(client.result(request)))
        results = await asyncio.gather(*pending)
        assert results[-1] == ("create", *(str(n) for n in range(1, NUM_FLOOD_PASSES + 1)))
        self.results += results

    async def _sample(self, client: Client, sampler: str, seq_id: int) -> None:
        request = await self._accepted(lambda: client.sample(sampler, seq_id, max_tokens=20))
        self.results.append(await client.result(request))

    async def _accepted(self, send: Any) -> str:
        while True:
            try:
                return str(await send())
            except Busy:
                self.refusals += 1
                await asyncio.sleep(1.0)


async def modest(plane: Any, tenant: str, until: float) -> list[float]:
    """Seconds of each step of a client that waits for its results and thinks before it goes on."""
    client = await Client(plane, tenant).open()
    run, loop, times, seq_id = await client.create(), asyncio.get_running_loop(), [], 0
    while loop.time() < until:
        began = loop.time()
        step = [
            await client.submit(run, seq_id + 1, pass_command("p", MODEST_TOKENS)),
            await client.submit(run, seq_id + 2, optim()),
        ]
        for request in step:
            await client.result(request)
        times.append(loop.time() - began)
        seq_id += 2
        await asyncio.sleep(0.03)
    return times


async def measure(
    root: Path, limits: dict[str, Any], with_flood: bool, seconds: float = 40
) -> tuple[float, Flood]:
    """The modest tenants' mean step in seconds, after the flood's burst; and the flood, all done."""
    config: Config = make_config().model_copy(
        update={"limits": LimitsConfig.model_validate({"tenant": limits})}
    )
    group = EchoGroup(max_slots=8, pass_s=0.02)
    group.token_s, group.decode_s = 2e-4, 0.001
    async with control_plane(root, group, config) as plane:
        flood = Flood(plane)
        flooding = asyncio.create_task(flood.go()) if with_flood else None
        await asyncio.sleep(2)
        until = asyncio.get_running_loop().time() + seconds
        steps = await asyncio.gather(*(modest(plane, f"modest {n}", until) for n in range(4)))
        if flooding is not None:
            assert not flooding.done(), "the flood was over before the modest ones were"
            await flooding
        return statistics.fmean(time for times in steps for time in times), flood


@virtual
async def test_a_flood_within_its_rate_slows_others_by_less_than_a_tenth(tmp_path: Path) -> None:
    limits = {"tokens_per_s": 150, "token_burst_s": 5, "pending_requests": 100}
    alone, _ = await measure(tmp_path / "a", limits, with_flood=False)
    beside, flood = await measure(tmp_path / "b", limits, with_flood=True)
    assert beside < 1.1 * alone
    assert len(flood.results) == NUM_FLOOD_RUNS * NUM_FLOOD_PASSES + NUM_FLOOD_SAMPLES, "nothing is lost"
    assert flood.refusals > 0, "and it was held back at the door"


@virtual
async def test_without_limits_it_would_not_hold(tmp_path: Path) -> None:
    """Fair shares alone keep the modest going, at the speed of one of five."""
    free = {"tokens_per_s": 1e9}
    alone, _ = await measure(tmp_path / "a", free, with_flood=False, seconds=5)
    beside, _ = await measure(tmp_path / "b", free, with_flood=True, seconds=5)
    assert beside > 1.5 * alone
