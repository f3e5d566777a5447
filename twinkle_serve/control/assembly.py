"""Turns planned commands into one Tick: what can run is given a slot, what cannot gets its verdict.

Knows slots, and what else a tick has to do (moves, snapshots, samples). Does not know what a command asks of
the group or what its outcome will mean (orders.py), nor when ticks run.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from twinkle_serve.control.backend import Invalid, NotFound, UnloadCommand
from twinkle_serve.control.books import Books
from twinkle_serve.control.commands import RunEntry
from twinkle_serve.control.flights import INTERNAL_ERROR, Assembly
from twinkle_serve.control.keeper import Keeper
from twinkle_serve.control.microbatches import pack
from twinkle_serve.control.orders import Done, Orders, Place, Refused
from twinkle_serve.control.planner import Window
from twinkle_serve.control.residency import Placement, Residency
from twinkle_serve.control.runs import Run
from twinkle_serve.control.telling import proof_of
from twinkle_serve.protocol.errors import UserError
from twinkle_serve.protocol.work import DropRun, Failure, Outcome, Sample, Tick

logger = logging.getLogger(__name__)


class Assembler:
    """Makes the ticks of one group."""

    def __init__(
        self,
        group: str,
        books: Books,
        residency: Residency,
        microbatch_tokens: int,
        deterministic: bool,
        keeper: Keeper | None = None,
    ) -> None:
        self._group = group
        self._books = books
        self._residency = residency
        self._microbatch_tokens = microbatch_tokens
        self._deterministic = deterministic
        self._keeper = keeper
        self._orders = Orders(books, keeper, self.park)
        self._drops: list[DropRun] = []
        self._num_ticks = 0

    def assemble(
        self,
        assembly: Assembly,
        window: Window,
        samples: Sequence[Sample] = (),
        cancels: Sequence[str] = (),
        decode_budget_s: float = 0.0,
        even_if_empty: bool = False,
    ) -> Tick | None:
        """The tick that does all this, or None if nothing needs the group. ``assembly`` is filled on the
        way, so that a failure in here leaves a list of who is affected."""
        placed = self._translate(assembly, window)
        drop_snapshots = self._evicted()
        placement = self._residency.place(list(placed))
        for run_id, places in placed.items():
            for place in places:
                place(placement.slots[run_id])
        assembly.drops, self._drops = [*self._drops, *assembly.drops], []
        self._persist(assembly)
        wanted = (placed, assembly.drops, assembly.persists, drop_snapshots, samples, cancels)
        if not any(wanted) and not even_if_empty:
            return None
        return self._tick(assembly, placement, drop_snapshots, samples, cancels, decode_budget_s)

    def park(self, run_id: str) -> None:
        """Free the run's slot: it is on disk and comes back from there, or there is nothing to keep."""
        drop = self._residency.drop(run_id)
        if drop is not None:
            self._drops.append(drop)

    def lose_all(self) -> None:
        """The group is gone: what it was still to drop is gone with it."""
        self._drops.clear()

    def _tick(
        self,
        assembly: Assembly,
        placement: Placement,
        drop_snapshots: Sequence[str],
        samples: Sequence[Sample],
        cancels: Sequence[str],
        decode_budget_s: float,
    ) -> Tick:
        self._num_ticks += 1
        return Tick(
            self._num_ticks,
            page_out=placement.page_out,
            drops=tuple(assembly.drops),
            page_in=placement.page_in,
            restores=tuple(assembly.restores),
            creates=tuple(assembly.creates),
            loads=tuple(assembly.loads),
            passes=tuple(assembly.passes),
            microbatches=pack(assembly.pass_loads, self._microbatch_tokens, self._deterministic),
            optim_steps=tuple(assembly.optim_steps),
            saves=tuple(assembly.saves),
            snapshots=tuple(assembly.snapshots),
            persists=tuple(assembly.persists),
            drop_snapshots=tuple(drop_snapshots),
            cancels=tuple(cancels),
            samples=tuple(samples),
            decode_budget_s=decode_budget_s,
        )

    def _evicted(self) -> list[str]:
        names = self._books.samplers.evict(self._group)
        if self._keeper is not None:
            for name in names:
                try:
                    self._keeper.files.remove(self._keeper.sampler_file(name))
                except OSError:
                    logger.exception("the file of snapshot %s is still there", name)
        return names

    def _persist(self, assembly: Assembly) -> None:
        """Let the runs whose time has come be written to disk as they are when this tick is over."""
        if self._keeper is None:
            return
        for run_id in self._keeper.due(self._group):
            if self._residency.knows(run_id):
                order, flight = self._keeper.persist(run_id, self._residency.slot_of(run_id))
                assembly.persists.append(order)
                assembly.flights[flight.request_id] = flight

    # commands -------------------------------------------------------------------------------------

    def _translate(self, assembly: Assembly, window: Window) -> dict[str, list[Place]]:
        """What to do for each run once its slot is known. Commands that cannot run become verdicts."""
        placed: dict[str, list[Place]] = {}
        for work in window.work:
            run = self._books.runs.find(work.run_id)
            assert run is not None
            for entry in work.entries:
                if self._keeper is not None:
                    self._keeper.executed(run, entry)
                try:
                    place = self._prepare(assembly, run, entry)
                except Done as done:
                    _decide(assembly, entry, done.value)
                except Refused as refused:
                    _decide(assembly, entry, failure=refused.failure, of_the_run=refused.failure is run.down)
                except (UserError, Invalid, NotFound) as error:
                    _decide(assembly, entry, failure=Failure(str(error)))
                except Exception:
                    logger.exception("could not prepare request %s", entry.request_id)
                    _decide(assembly, entry, failure=INTERNAL_ERROR)
                else:
                    placed.setdefault(run.run_id, []).append(place)
        return placed

    def _prepare(self, assembly: Assembly, run: Run, entry: RunEntry) -> Place:
        """As Orders.of."""
        if isinstance(entry.command, UnloadCommand):
            self._unload(assembly, run)
            raise Done({"model_id": run.run_id})
        return self._orders.of(assembly, run, entry)

    def _unload(self, assembly: Assembly, run: Run) -> None:
        self._books.runs.unload(run)
        self._books.samplers.retire(run.run_id, keep=0)
        drop = self._residency.drop(run.run_id)
        if drop is not None:
            assembly.drops.append(drop)
        if self._keeper is not None:
            self._keeper.retire(run)


def _decide(
    assembly: Assembly,
    entry: RunEntry,
    value: Any = None,
    failure: Failure | None = None,
    of_the_run: bool = False,
) -> None:
    """of_the_run: the failure follows from what became of the run, as it will when that is done again."""
    assembly.verdicts.append(Outcome(entry.request_id, value, failure))
    if not of_the_run:
        assembly.proofs[entry.request_id] = proof_of(entry.command)
