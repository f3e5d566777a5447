"""Random schedules: clients that resend, reorder, lose and delay, over a group that may die.

``simulate(seed)`` is the same history for the same seed. Each client keeps its own idea of what its run
should hold and compares it with every answer; the group objects to ticks that cannot be run. So a schedule
that ends shows that each request got exactly one answer, and each answered command was applied exactly
once, in order, to the right run.
"""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.control.echo_group import EchoGroup, pass_command
from tests.control.memory_catalog import MemoryCatalog
from tests.control.plane import Client, control_plane, counting_tokens, make_config, optim
from tests.control.virtual_time import run as run_virtual
from twinkle_serve.control.backend import (
    LoadCommand,
    NotFound,
    RejectedCommand,
    SaveCommand,
    SnapshotCommand,
)
from twinkle_serve.protocol.work import Failure

GAP_S = 60.0


@dataclass
class Sent:
    """One command of a run: when it got an answer, ``value`` or ``failure``."""

    kind: str
    detail: str
    value: Any = None
    failure: Failure | None = None
    lost: bool = False


@dataclass
class Report:
    counts: Counter = field(default_factory=Counter)
    num_ticks: int = 0
    passes_together: int = 0


def simulate(seed: int, crashes: bool = False) -> Report:
    """Run one schedule to its end. Raises AssertionError where the control plane broke a promise."""
    return run_virtual(_simulate(random.Random(seed), crashes))


async def _simulate(rng: random.Random, crashes: bool) -> Report:
    group = EchoGroup(max_slots=rng.randint(1, 4), pass_s=rng.choice([0.001, 0.05, 1.0]))
    group.delay_saves = rng.choice([0, 0, 0, 1, 3])
    if crashes:
        group.crash_when = lambda tick, phase: rng.random() < 0.01
    config = make_config(
        gap_timeout_s=GAP_S, tick_tokens=rng.choice([50, 1000]), company_wait_ms=rng.choice([0, 25])
    )
    report = Report()
    async with control_plane(
        Path(), group, config, catalog=MemoryCatalog(), new_token=counting_tokens()
    ) as plane:
        tenants = [f"tenant {n}" for n in range(rng.randint(1, 4))]
        actors = [
            RandomRun(plane, rng.choice(tenants), number, random.Random(rng.random()), report, crashes)
            for number in range(rng.randint(1, 6))
        ]
        await asyncio.gather(*(actor.live() for actor in actors))
        assert plane._books.promises.num_pending == 0
    report.num_ticks = len(group.ticks)
    report.passes_together = max((len(tick.passes) for tick in group.ticks), default=0)
    return report


class RandomRun:
    """One run and everything that its client does with it, in so many bursts of so many commands at most."""

    max_bursts = 6
    max_commands = 6
    first_seq_id = 1
    born: tuple[str, ...] = ("create",)

    def __init__(self, plane, tenant: str, number: int, rng: random.Random, report: Report, crashes: bool):
        self.client = Client(plane, tenant)
        self.rng = rng
        self.report = report
        self.crashes = crashes
        self.number = number
        self.run_id = ""
        self.sent: dict[int, Sent] = {}
        self.samples: list[tuple[str, Any]] = []

    async def live(self) -> None:
        await self.client.open()
        await asyncio.sleep(self.rng.uniform(0, 2))
        if not await self._create():
            return
        burst_start = self.first_seq_id
        for _ in range(self.rng.randint(1, self.max_bursts)):
            size = self.rng.randint(1, self.max_commands)
            await self._burst(list(range(burst_start, burst_start + size)))
            burst_start += size
            await asyncio.sleep(self.rng.choice([0, 0.001, 0.01, 0.5]))
        await self._check_samples()
        self._check_history()

    async def _create(self) -> bool:
        try:
            self.run_id = await self.client.create(self.number)
        except AssertionError:
            assert self.crashes
            self.report.counts["stillborn"] += 1
            return False
        return True

    async def _burst(self, seq_ids: list[int]) -> None:
        """Send some commands at once: out of order, some twice, maybe one never; await all answers."""
        for seq_id in seq_ids:
            self.sent[seq_id] = self._choose(seq_id)
        order = seq_ids[:]
        if self.rng.random() < 0.5:
            self.rng.shuffle(order)
        if self.rng.random() < 0.1:
            self.sent[order.pop(self.rng.randrange(len(order)))].lost = True
        order += [seq_id for seq_id in order if self.rng.random() < 0.2]
        await asyncio.gather(*(self._send(seq_id, self.rng.choice([0, 0, 0.001, 0.3])) for seq_id in order))

    def _choose(self, seq_id: int) -> Sent:
        saved = [s.detail for s in self.sent.values() if s.kind == "save" and s.value]
        kinds = ["pass"] * 6 + ["optim"] * 4 + ["forward", "bad", "rejected", "save", "snapshot"]
        kind = self.rng.choice(kinds + ["load"] * (3 if self.crashes else 1) * bool(saved))
        detail = self.rng.choice(saved) if kind == "load" else f"{kind}{seq_id}"
        return Sent(kind, detail)

    def _command(self, seq_id: int) -> Any:
        sent = self.sent[seq_id]
        match sent.kind:
            case "pass" | "forward" | "bad":
                return pass_command(sent.detail, seq_id % 7 + 1, 20, backward=sent.kind != "forward")
            case "optim":
                return optim(seq_id)
            case "save":
                return SaveCommand("weights", sent.detail)
            case "snapshot":
                return SnapshotCommand(seq_id)
            case "load":
                return LoadCommand(f"tinker://{self.run_id}/weights/{sent.detail}", True)
            case _:
                return RejectedCommand(Failure("rejected"))

    async def _send(self, seq_id: int, delay: float) -> None:
        await asyncio.sleep(delay)
        sent = self.sent[seq_id]
        request = await self.client.submit(self.run_id, seq_id, self._command(seq_id))
        while (poll := await self.client.plane.poll(self.client.tenant, request, 30.0)).state == "pending":
            pass
        assert poll.state == "done"
        assert (sent.value, sent.failure) in ((None, None), (poll.value, poll.failure)), "two answers"
        sent.value, sent.failure = poll.value, poll.failure
        self.report.counts[f"{sent.kind} {'failed' if poll.failure else 'done'}"] += 1
        if sent.kind == "snapshot" and poll.failure is None:
            await self._sample(seq_id)

    async def _sample(self, seq_id: int) -> None:
        sampler = self.sent[seq_id].value["sampling_session_id"]
        try:
            request = await self.client.sample(sampler, 0, max_tokens=self.rng.choice([1, 30]))
        except NotFound:
            self.report.counts["sample evicted"] += 1
            return
        if self.rng.random() < 0.2:
            await self.client.plane.cancel(self.client.tenant, request)
        self.samples.append((request, seq_id))

    async def _check_samples(self) -> None:
        for request, seq_id in self.samples:
            poll = await self.client.poll(request)
            if poll.state == "gone":
                assert self.crashes
            elif poll.failure is not None:
                assert poll.failure.message == "cancelled", poll
            else:
                assert poll.value == self._history()[seq_id]
            self.report.counts["sample over"] += 1

    def _check_history(self) -> None:
        for seq_id, history in self._history().items():
            value = self.sent[seq_id].value
            if self.sent[seq_id].kind in ("pass", "forward"):
                assert value == history, (self.run_id, seq_id)
            elif self.sent[seq_id].kind == "optim":
                assert value == {"history": history}, (self.run_id, seq_id, value, history)

    def _history(self) -> dict[int, tuple[str, ...]]:
        """What the run holds after each command that succeeded, if these and no others were applied."""
        state = self.born
        stored, after = {}, {}
        for seq_id, sent in sorted(self.sent.items()):
            self._check_failure(seq_id, sent)
            if sent.failure is not None or sent.value is None:
                continue
            match sent.kind:
                case "pass":
                    state = (*state, sent.detail)
                case "optim":
                    state = (*state, f"optim {seq_id}")
                case "save":
                    stored[sent.detail] = state
                case "load":
                    state = (*stored[sent.detail], "load")
            after[seq_id] = state
        return after

    def _check_failure(self, seq_id: int, sent: Sent) -> None:
        assert sent.value is not None or sent.failure is not None or sent.lost, "no answer"
        if sent.failure is None or sent.kind in ("bad", "rejected"):
            return
        gaps = ("did not arrive within", "too late")
        ours = any(word in sent.failure.message for word in gaps)
        assert ours or (self.crashes and sent.failure.category == "server"), sent
