"""A group that computes nothing, remembers everything, and objects to any tick that a real one could not run.

An adapter is the list of what was done to it; a result is that list. So a test that compares results with
what it sent sees whether each command was applied, once, in order, to the right run.
"""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

import numpy as np

from twinkle_serve.control.backend import PassCommand
from twinkle_serve.control.group import GroupLost
from twinkle_serve.protocol.data import SampleDelta
from twinkle_serve.protocol.work import (
    AdapterRef,
    Failure,
    ModelInfo,
    Outcome,
    Pass,
    Progress,
    RestoreRun,
    Sample,
    Tick,
    TickReport,
)
from twinkle_serve.storage.checkpoints import write_checkpoint

History = tuple[str, ...]


def pass_command(tag: str, *lengths: int, backward: bool = True) -> PassCommand:
    """A pass that an EchoGroup writes down as ``tag``; one that starts with "bad" fails there."""
    lengths = lengths or (10,)
    datums = json.dumps([tag, lengths]).encode()
    return PassCommand(datums, lengths, "cross_entropy", {}, backward)


def delta(num_tokens: int) -> SampleDelta:
    return SampleDelta(0, np.ones(num_tokens, np.int32), np.zeros(num_tokens, np.float32))


@dataclass
class Slot:
    run_id: str
    history: list[str] = field(default_factory=list)


@dataclass
class ActiveSample:
    sample: Sample
    seconds_left: float
    weights: History


class EchoGroup:
    """pass_s + token_s per token is what passes take, decode_s per token of a sample (all in parallel)."""

    def __init__(self, name: str = "base", max_slots: int = 2, pass_s: float = 0.05) -> None:
        self.info = ModelInfo(name, "echo", name, 1000, 4096, 32, max_slots, (2,))
        self.pass_s, self.token_s, self.decode_s = pass_s, 1e-6, 0.01
        self.slots: list[Slot | None] = [None] * max_slots
        self.paged: dict[str, Slot] = {}
        self.stored: dict[str, History] = {}
        self.snapshots: dict[str, History] = {}
        self.active: dict[str, ActiveSample] = {}
        self.ticks: list[Tick] = []
        self.late_saves: list[tuple[int, Outcome]] = []
        self.delay_saves = 0  # how many ticks later a save is answered
        self.files: dict[str, History] = {}
        self.writing: list[tuple[str | None, str, History]] = []
        self.on_disk = False
        self.num_unwilling = 0  # so many restores fail, though nothing is wrong with their files
        self.num_crashes_left = 0
        self.crash_when = lambda tick, phase: False
        self.fails = lambda tag: tag.startswith("bad")
        self.tried: list[str] = []
        self.num_trying = self.most_trying = 0
        self.raise_in_tick: Exception | None = None
        self.rebuilds = 0
        self.rebuild_failures = 0
        self.is_up = True
        self.bytes_per_page = 0
        self.bytes_per_result = 0
        self.decoded_s = 0.0  # in the last tick

    # the contract ---------------------------------------------------------------------------------

    async def check_loss(self, graph: str) -> Failure | None:
        """A loss whose text starts with "bad" is one; "lost" is tried when no rank is there."""
        self.tried.append(graph)
        self.num_trying += 1
        self.most_trying = max(self.most_trying, self.num_trying)
        await asyncio.sleep(0.01)
        self.num_trying -= 1
        if graph.startswith("lost"):
            raise GroupLost("no rank")
        return Failure("a bad loss") if graph.startswith("bad") else None

    async def run(self, tick: Tick) -> AsyncIterator[Outcome | Progress | TickReport]:
        if not self.is_up:
            raise GroupLost("not up")
        assert tick.tick_id > (self.ticks[-1].tick_id if self.ticks else 0)
        self.ticks.append(tick)
        if self.raise_in_tick is not None:
            error, self.raise_in_tick = self.raise_in_tick, None
            raise error
        await asyncio.sleep(0.0005)
        self._move(tick)
        for restore in tick.restores:
            yield self._restore(restore)
        for create in tick.creates:
            assert self.slots[create.slot] is None, "a slot was not empty"
            self.slots[create.slot] = Slot(create.run_id, ["create"])
            yield Outcome(create.request_id)
        for load in tick.loads:
            yield self._load(load)
        self._crash(tick, "passes")
        async for outcome in self._passes(tick):
            yield outcome
        self._crash(tick, "optim")
        for step in tick.optim_steps:
            self._slot(step.slot).history.append(f"optim {step.params.learning_rate:g}")
            yield Outcome(step.request_id, {"history": tuple(self._slot(step.slot).history)})
        due = [outcome for tick_id, outcome in self.late_saves if tick_id <= tick.tick_id]
        self.late_saves = [late for late in self.late_saves if late[0] > tick.tick_id]
        for outcome in due:
            yield outcome
        for save in tick.saves:
            self.stored[save.directory] = tuple(self._slot(save.slot).history)
            if self.on_disk:
                write_checkpoint(save.directory, {"adapter": b"1"}, save.manifest)
            outcome = Outcome(save.request_id, 100 + len(self._slot(save.slot).history))
            if self.delay_saves:
                self.late_saves.append((tick.tick_id + self.delay_saves, outcome))
            else:
                yield outcome
        self._crash(tick, "save")
        for snapshot in tick.snapshots:
            assert snapshot.adapter not in self.snapshots
            self.snapshots[snapshot.adapter] = tuple(self._slot(snapshot.slot).history)
            yield Outcome(snapshot.request_id)
            if snapshot.path is not None:
                self.writing.append((None, snapshot.path, self.snapshots[snapshot.adapter]))
        for outcome in self._write(tick):
            yield outcome
        for name in tick.drop_snapshots:
            assert not any(a.sample.adapter == AdapterRef(name) for a in self.active.values())
            self.snapshots.pop(name, None)
        self._crash(tick, "decode")
        async for outcome in self._decode(tick):
            yield outcome
        yield TickReport(
            tick.tick_id,
            {"passes": self.pass_s if tick.passes else 0.0, "sample": self.decoded_s},
            len(self.active),
            {"rank0/experts_bytes": 7.0, "paged_host_bytes": self.bytes_per_page * len(self.paged)},
        )

    async def rebuild(self) -> ModelInfo:
        if self.rebuild_failures:
            self.rebuild_failures -= 1
            raise RuntimeError("no machine")
        await asyncio.sleep(4.0)
        self.rebuilds += 1
        self.is_up = True
        return self.info

    # inside ---------------------------------------------------------------------------------------

    def _slot(self, index: int) -> Slot:
        slot = self.slots[index]
        assert slot is not None, "nothing is in this slot"
        return slot

    def _move(self, tick: Tick) -> None:
        for move in tick.page_out:
            slot = self._slot(move.slot)
            assert slot.run_id == move.run_id
            self.paged[move.run_id], self.slots[move.slot] = slot, None
        for drop in tick.drops:
            if drop.slot is None:
                del self.paged[drop.run_id]
            else:
                slot = self.slots[drop.slot]
                assert slot is None or slot.run_id == drop.run_id
                self.slots[drop.slot] = None
        for move in tick.page_in:
            assert self.slots[move.slot] is None, "a slot was not empty"
            self.slots[move.slot] = self.paged.pop(move.run_id)

    def _load(self, load) -> Outcome:
        history = self.stored.get(load.directory)
        if history is None:
            return Outcome(load.request_id, failure=Failure("the checkpoint is missing"))
        slot = self.slots[load.slot]
        assert slot is None or slot.run_id == load.run_id
        self.slots[load.slot] = Slot(load.run_id, [*history, "load"])
        return Outcome(load.request_id)

    def _restore(self, restore: RestoreRun) -> Outcome:
        assert self.slots[restore.slot] is None, (
            "a slot was not empty",
            restore,
            self.slots,
            self.ticks[-2:],
        )
        if self.num_unwilling:
            self.num_unwilling -= 1
            return Outcome(restore.request_id, failure=Failure("the disk is away", "server"))
        if restore.path not in self.files:
            return Outcome(restore.request_id, failure=Failure("the file is damaged"))
        self.slots[restore.slot] = Slot(restore.run_id, list(self.files[restore.path]))
        return Outcome(restore.request_id)

    def _write(self, tick: Tick) -> list[Outcome]:
        """What the last tick began to write is whole now."""
        outcomes = []
        for request_id, path, history in self.writing:
            self.files[path] = history
            if request_id is not None:
                outcomes.append(Outcome(request_id, len(history)))
        self.writing = []
        for persist in tick.persists:
            slot = self.paged[persist.run_id] if persist.slot is None else self._slot(persist.slot)
            assert slot.run_id == persist.run_id
            self.writing.append((persist.request_id, persist.path, tuple(slot.history)))
        return outcomes

    async def _passes(self, tick: Tick) -> AsyncIterator[Outcome]:
        parts = [json.loads(p.datums) for p in tick.passes]
        seen = Counter(
            (piece.pass_index, i) for mb in tick.microbatches for piece in mb for i in piece.indices
        )
        wanted = {(p, i) for p, (_, lengths) in enumerate(parts) for i in range(len(lengths))}
        assert seen == dict.fromkeys(wanted, 1), "not every datum is in exactly one microbatch"
        if tick.passes:
            await asyncio.sleep(self.pass_s + self.token_s * sum(sum(n) for _, n in parts))
        for item, (tag, _) in zip(tick.passes, parts, strict=True):
            yield self._pass(item, tag)

    def _pass(self, item: Pass, tag: str) -> Outcome:
        slot = self._slot(item.slot)
        if self.fails(tag):
            return Outcome(item.request_id, failure=Failure(f"{tag} is bad"))
        if item.backward:
            slot.history.append(tag)
        return Outcome(item.request_id, tuple(slot.history), num_bytes=self.bytes_per_result)

    async def _decode(self, tick: Tick) -> AsyncIterator[Outcome | Progress]:
        for request_id in tick.cancels:
            cancelled = self.active.pop(request_id, None)
            if cancelled is not None:
                yield Outcome(request_id, failure=Failure("cancelled"), metrics=self._used(cancelled))
        for sample in tick.samples:
            seconds = self.decode_s * (sample.request.params.max_tokens or 1)
            self.active[sample.request_id] = ActiveSample(sample, seconds, self._weights(sample.adapter))
        self.decoded_s = 0.0
        if not self.active or tick.decode_budget_s == 0:
            return
        self.decoded_s = step = min(tick.decode_budget_s, max(a.seconds_left for a in self.active.values()))
        await asyncio.sleep(step)
        for request_id, active in list(self.active.items()):
            active.seconds_left -= step
            if active.sample.stream:
                yield Progress(request_id, (delta(round(step / self.decode_s)),))
            if active.seconds_left <= 1e-9:
                del self.active[request_id]
                yield Outcome(request_id, active.weights)

    def _used(self, active: ActiveSample) -> dict[str, float]:
        request = active.sample.request
        drawn = (request.params.max_tokens or 1) - round(active.seconds_left / self.decode_s)
        return {"prompt_tokens": float(len(request.prompt)), "sampled_tokens": float(drawn)}

    def _weights(self, adapter: AdapterRef | None) -> History:
        if adapter is None:
            return ()
        if adapter.directory is not None:
            return (self.stored | self.files)[adapter.directory]
        return self.snapshots[adapter.adapter]

    def _crash(self, tick: Tick, phase: str) -> None:
        if self.crash_when(tick, phase):
            self.is_up = False
            self.slots = [None] * len(self.slots)
            self.paged.clear()
            self.snapshots.clear()
            self.active.clear()
            self.late_saves.clear()
            self.writing.clear()
            raise GroupLost(f"killed in {phase}")
