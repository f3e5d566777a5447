"""What becomes of a run whose client is gone: it leaves its slot, and in the end the disk.

A finished session does not come back, so its runs are unloaded once all that they were asked for is done. An
expired one may: its client was asleep perhaps. So its runs are only parked, and unloaded when nothing was
heard for ``limits.run_retention_s``. Checkpoints stay in both cases, and so do results, for their time. Knows
sessions, and when a run is at rest. Does not know what an unload leaves on disk (keeper.py), or ticks.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from itertools import islice

from twinkle_serve.control.books import Books
from twinkle_serve.control.commands import RestoreCommand
from twinkle_serve.control.groups import Drivers
from twinkle_serve.control.keeper import Keeper
from twinkle_serve.control.kept import Kept
from twinkle_serve.control.runs import Run

logger = logging.getLogger(__name__)
_AT_ONCE = 10  # in one sweep: each is a transaction of the catalogue, and everybody waits for it


class Ending:
    """retention_s: ``limits.run_retention_s``. Without a keeper nothing of a run outlives its group."""

    def __init__(
        self, books: Books, drivers: Drivers, keeper: Keeper | None, retention_s: float | None
    ) -> None:
        self._books = books
        self._drivers = drivers
        self._keeper = keeper
        self._retention_s = retention_s

    def park(self, run_id: str) -> None:
        """The run's session has expired: its slot is for others, as soon as a snapshot has everything."""
        run = self._books.runs.find(run_id)
        if self._keeper is not None and run is not None and not run.record.unloaded:
            self._keeper.park(run)
            driver = self._drivers.get(run.group)
            if driver is not None:  # its base model may be served no more
                driver.wake()

    def sweep(self) -> None:
        """Unload runs that nobody will ask for anything again, some at a time."""
        if self._keeper is not None:
            over = (run for run in self._on_disk(self._keeper) if self._is_over(run))
            at_rest = (run for run in over if self._is_at_rest(self._keeper, run))
            for run in list(islice(at_rest, _AT_ONCE)):
                self._unload(self._keeper, run)

    def _on_disk(self, keeper: Keeper) -> Iterator[Run]:
        for run_id in dict.fromkeys([*keeper.kept, *self._books.samplers.runs_with_snapshots()]):
            run = self._books.runs.find(run_id)
            if run is not None and not run.record.unloaded:
                yield run

    def _is_over(self, run: Run) -> bool:
        """What is left of a corrupted run is for its rescue, so that has its time in any case."""
        sessions, session_id = self._books.sessions, run.record.session_id
        if sessions.is_active(session_id):
            return False
        if sessions.is_finished(session_id) and not run.record.corrupted:
            return True
        heard_at = max(sessions.last_seen(session_id), run.record.last_request_at)
        return self._retention_s is not None and self._books.clock.now() - heard_at >= self._retention_s

    def _is_at_rest(self, keeper: Keeper, run: Run) -> bool:
        """Whether nothing is being done for the run, nothing waits, and every answer is there."""
        kept, log, driver = keeper.kept.get(run.run_id), run.log, self._drivers.get(run.group)
        if log.is_held or log.parked or keeper.is_in_tick(run):
            return False
        # Where it is not in a slot, what brings it back stands first in its log, and else is under way.
        is_asleep = bool(log.ready) and isinstance(log.ready[0].command, RestoreCommand)
        if len(log.ready) > is_asleep or (kept is not None and not self._is_settled(kept, is_asleep)):
            return False
        return driver is None or not (driver.run_standing(run) or driver.is_working_for(run.run_id))

    def _is_settled(self, kept: Kept, is_asleep: bool) -> bool:
        """A load that waits for a snapshot to be told is told once the run is unloaded."""
        if kept.is_persisting or kept.is_rewinding or kept.is_restoring != is_asleep:
            return False
        asked = (request_id for request_id, _ in kept.unstored.values() if not kept.is_untold(request_id))
        return not any(self._books.promises.is_pending(request_id) for request_id in asked)

    def _unload(self, keeper: Keeper, run: Run) -> None:
        """Killed in the middle of this, the next start finds the run in the journal and does it again."""
        logger.info("run %s is unloaded: nobody is there for it any more", run.run_id)
        self._books.runs.unload(run)
        self._books.samplers.retire(run.run_id, keep=0)
        run.log.ready.clear()  # it is restored no more
        driver = self._drivers.get(run.group)
        if driver is not None:
            driver.end(run)
        keeper.retire(run)
