"""Random schedules in which everything dies: the group in any phase, the coordinator at any moment.

Clients behave as in simulator.py and like the SDK: an unavailable service is asked again with the same
seq_id. What they must see is stricter than there: no crash is ever an answer, so each command that was
acknowledged is applied exactly once and in order, and every promise is kept.
"""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from contextlib import suppress
from dataclasses import replace
from typing import Any
from unittest.mock import patch

from tests.control.durable_run import DurableRun, ShortRun
from tests.control.echo_group import EchoGroup
from tests.control.memory_catalog import MemoryCatalog
from tests.control.memory_journal import MemoryFiles, MemoryJournal
from tests.control.plane import counting_tokens, make_config
from tests.control.simulator import GAP_S, Report
from tests.control.virtual_time import VirtualClock
from tests.control.virtual_time import run as run_virtual
from twinkle_serve.config import Config
from twinkle_serve.control import suspects
from twinkle_serve.control.backend import Poll
from twinkle_serve.control.durability import Durability
from twinkle_serve.control.service import ControlPlane
from twinkle_serve.protocol.errors import BackendUnavailable
from twinkle_serve.storage.journal_rows import JournalEntry

_ENOUGH_S = 5_000.0
_LONG = 0.1
_AMPLE = 2**30  # bytes of journal


def simulate(seed: int) -> Report:
    """Run one schedule to its end. Raises AssertionError where a promise was broken."""
    # Here deaths are nobody's fault, however often they meet the same request.
    with patch.object(suspects, "_GUILTY_AFTER", 10**9):
        return run_virtual(_simulate(random.Random(seed)))


def _config(rng: random.Random) -> Config:
    config = make_config(
        gap_timeout_s=GAP_S, tick_tokens=rng.choice([50, 1000]), company_wait_ms=rng.choice([0, 25])
    )
    storage = config.storage.model_copy(
        update={
            "snapshot_every_steps": rng.choice([1, 2, 4, 1000]),
            "snapshot_every_s": rng.choice([0.01, 1.0, 60.0]),
            "snapshot_replay_s": rng.choice([0.1, 10.0]),
            # The second is full after some requests, again and again.
            "journal_max_bytes": rng.choice([_AMPLE, _AMPLE, 1500]),
        }
    )
    return config.model_copy(update={"storage": storage})


async def _simulate(rng: random.Random) -> Report:
    server = Server(rng, _config(rng))
    report = Report()
    await server.start()
    # Most schedules are short, so that there can be many; whatever can go wrong does so in a few requests.
    is_long = rng.random() < _LONG
    kind = DurableRun if is_long else ShortRun
    actors = [
        kind(server, f"tenant {rng.randint(0, 2)}", n, random.Random(rng.random()), report, True)
        for n in range(rng.randint(1, 4 if is_long else 2))
    ]
    chaos = asyncio.create_task(_chaos(server, rng))
    living = asyncio.gather(*(actor.live() for actor in actors))
    _, late = await asyncio.wait({living}, timeout=_ENOUGH_S)
    assert not late, describe(server)
    await living
    chaos.cancel()
    await asyncio.gather(chaos, return_exceptions=True)
    if server.plane is None:
        await server.start()
    server.group.crash_when = lambda tick, phase: False
    await server.crash()
    await asyncio.gather(*(actor.look_again() for actor in actors))
    assert server.plane is not None
    for _ in range(1000):  # saves that were done again end in a later tick, and runs that nobody asked go on
        if server.plane._books.promises.num_pending:
            await asyncio.sleep(1)
    assert server.plane._books.promises.num_pending == 0, describe(server)
    await server.plane.close()
    report.counts += server.counts
    return report


async def _chaos(server: Server, rng: random.Random) -> None:
    for _ in range(rng.choice([0, 1, 2, 4, 8])):
        await asyncio.sleep(rng.expovariate(1 / rng.choice([0.3, 3.0, 30.0])))
        await server.crash(damage=rng.random() < 0.3)


class Died(Exception):
    """The server, in the middle of a call."""


class Server:
    """What clients reach: a control plane that is there most of the time. Files, rows and the catalogue
    survive its death; its group does not."""

    def __init__(self, rng: random.Random, config: Config) -> None:
        self.counts: Counter[str] = Counter()
        self.plane: ControlPlane | None = None
        self._rng = rng
        self._config = config
        self._catalog = MemoryCatalog()
        self._journal = MemoryJournal(rng)
        self._token = counting_tokens()
        self._max_slots = rng.randint(1, 3)
        self._pass_s = rng.choice([0.001, 0.05, 1.0])
        self._delay_saves = rng.choice([0, 0, 1, 3])
        self._tried: set[str] = set()
        self._crash_rate = rng.choice([0.0, 0.01, 0.1])
        self._up = asyncio.Event()
        self._calls: set[asyncio.Future[Any]] = set()
        self.group = self._new_group()

    def _new_group(self) -> EchoGroup:
        group = EchoGroup(max_slots=self._max_slots, pass_s=self._pass_s)
        group.delay_saves = self._delay_saves
        group.crash_when = self._group_dies
        group.num_unwilling = self._rng.choice([0, 0, 0, 1, 3])
        group.fails = self._fails
        return group

    def _fails(self, tag: str) -> bool:
        """A bad pass each time; a flaky one may fail when it is tried first."""
        if not tag.startswith("flaky") or tag in self._tried:
            return tag.startswith("bad")
        self._tried.add(tag)
        return self._rng.random() < 0.5

    def _group_dies(self, tick: Any, phase: str) -> bool:
        dies = self._rng.random() < self._crash_rate
        self.counts["group deaths"] += dies
        return dies

    async def start(self) -> None:
        files = MemoryFiles(self.group.files)
        self.plane = ControlPlane(
            {"base": self.group},
            self._catalog,  # type: ignore[arg-type]
            self._config,
            VirtualClock(),
            new_token=self._token,
            durability=Durability(self._journal, files),
        )
        await self.plane.start()
        self._up.set()

    async def crash(self, damage: bool = False) -> None:
        """As kill -9 does it: whatever was not durable is gone, and nobody is told."""
        assert self.plane is not None
        self._up.clear()
        for call in list(self._calls):
            call.cancel()
        self.counts["coordinator deaths"] += 1
        plane, self.plane = self.plane, None
        await _kill(plane)
        self._journal = self._journal.opened()
        dead, self.group = self.group, self._new_group()
        self.group.stored, self.group.files = dead.stored, dead.files
        if damage:
            self._damage_a_file()
        await asyncio.sleep(self._rng.choice([0, 0.5, 5.0]))
        await self.start()

    def _damage_a_file(self) -> None:
        """Of a snapshot that has another behind it."""
        twice = [h.snapshots for h in self._journal.rows.values() if len(h.snapshots) > 1]
        twice = [s for s in twice if all(f"/files/{one.file}" in self.group.files for one in s)]
        if twice:
            newest = self._rng.choice(twice)[0]
            self.group.files.pop(f"/files/{newest.file}", None)
            self.counts["damaged"] += 1

    @property
    def may_be_full(self) -> bool:
        """Whether this schedule's journal is of the kind that is full after some requests."""
        return self._config.storage.journal_max_bytes < _AMPLE

    def unnumbered(self, run_id: str) -> list[JournalEntry]:
        """What was accepted of the run without a seq_id, whether or not its client knows."""
        return [entry for entry in self._journal.unnumbered if entry.run_id == run_id]

    def left_of(self, session: str) -> list[str]:
        """Files and rows of a session's runs, but for results."""
        runs = ((r, h) for r, h in self._journal.rows.items() if r.startswith(f"{session}:"))
        rows = [run for run, history in runs if history.entries or history.snapshots]
        return rows + [file for file in self.group.files if file.startswith(f"/files/{session}:")]

    async def once(self, method: str, *arguments: Any) -> None:
        """Ask what must not be asked twice: it is unknown whether a server that dies over it accepted it."""
        with suppress(Died):
            await self._ask(method, arguments)

    def __getattr__(self, method: str) -> Any:
        async def call(*arguments: Any) -> Any:
            while True:
                with suppress(Died):
                    return _tuples(await self._ask(method, arguments))

        return call

    async def _ask(self, method: str, arguments: tuple[Any, ...]) -> Any:
        while True:
            await self._up.wait()
            answer = asyncio.ensure_future(getattr(self.plane, method)(*arguments))
            self._calls.add(answer)
            try:
                return await answer
            except BackendUnavailable:
                await asyncio.sleep(0.3)
            except asyncio.CancelledError:
                if not answer.cancelled():
                    raise  # not the server died, but who asks
                raise Died from None
            finally:
                self._calls.discard(answer)


def _tuples(value: Any) -> Any:
    """A result that was kept as JSON has lists where the group had tuples."""
    if isinstance(value, Poll):
        return replace(value, value=_tuples(value.value))
    if isinstance(value, dict):
        return {key: _tuples(item) for key, item in value.items()}
    return tuple(value) if isinstance(value, list) else value


async def _kill(plane: ControlPlane) -> None:
    tasks = [driver._task for driver in plane._drivers.values() if driver._task is not None]
    assert plane._keeper is not None
    tasks += plane._keeper._tasks
    for timer in plane._keeper._retries.values():
        timer.cancel()
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    plane._training.close()
    if plane._sweep_timer is not None:
        plane._sweep_timer.cancel()


def describe(server: Server) -> str:
    """What is still open, for a schedule that does not end."""
    plane = server.plane
    if plane is None or plane._keeper is None:
        return "down"
    lines = []
    for run_id, kept in plane._keeper.kept.items():
        log = kept.run.log
        lines.append(
            f"{run_id} down={kept.run.down} done={kept.done} covered={kept.covered} "
            f"ready={[(e.seq_id, type(e.command).__name__) for e in log.ready]} missing={log.missing} "
            f"restoring={kept.is_restoring} persisting={kept.is_persisting} unstored={kept.unstored}"
        )
    pending = [p for p in plane._books.promises._promises.values() if p.poll.state == "pending"]
    lines += [f"pending {p.request_id} {p.origin}" for p in pending]
    return "\n".join(lines)
