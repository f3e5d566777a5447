"""A journal and state files without a disk, for the thousands of short lives of the simulator.

What is committed survives a crash; what was only asked for does not. A commit takes random time, in the
order of the calls, and a journal that was opened again refuses the one before.
"""

from __future__ import annotations

import asyncio
import math
import random
from collections import defaultdict
from collections.abc import Callable
from dataclasses import fields
from typing import Any

from twinkle_serve.storage.journal import Fenced
from twinkle_serve.storage.journal_rows import JournalEntry, RunHistory, StoredResult, StoredSnapshot


class MemoryJournal:
    """storage.journal.Journal; ``opened`` gives the next one on the same rows."""

    def __init__(
        self,
        rng: random.Random,
        rows: dict[str, RunHistory] | None = None,
        unnumbered: list[JournalEntry] | None = None,
    ) -> None:
        """unnumbered: commands that came without a seq_id, whatever was dropped of them since."""
        self.rows: dict[str, RunHistory] = defaultdict(RunHistory) if rows is None else rows
        self.unnumbered: list[JournalEntry] = [] if unnumbered is None else unnumbered
        self.stalled: str | None = None
        self.num_bytes = 0
        self.fenced = False
        self._rng = rng
        self._ready_at = 0.0

    def opened(self) -> MemoryJournal:
        self.fenced = True
        return MemoryJournal(self._rng, self.rows, self.unnumbered)

    def append(self, entry: JournalEntry) -> asyncio.Future[None]:
        self.num_bytes += len(entry.payload)

        def work() -> None:
            self.rows[entry.run_id].entries.append(entry)
            if not entry.numbered:
                self.unnumbered.append(entry)

        return self._do(work)

    def cover(
        self,
        snapshot: StoredSnapshot,
        results: list[StoredResult],
        drop_until: int,
        drop_snapshots: list[int],
    ) -> asyncio.Future[None]:
        def work() -> None:
            history = self.rows[snapshot.run_id]
            gone = {*drop_snapshots, snapshot.covered}
            kept = [s for s in history.snapshots if s.covered not in gone]
            history.snapshots = sorted([snapshot, *kept], key=lambda s: -s.covered)
            self._drop_entries(history, drop_until)
            self._store(history, results)

        return self._do(work)

    def retire(self, run_id: str, results: list[StoredResult]) -> asyncio.Future[None]:
        def work() -> None:
            history = self.rows[run_id]
            self._drop_entries(history)
            history.snapshots = []
            self._store(history, results)

        return self._do(work)

    def expire_results(self, settled_before: float) -> asyncio.Future[None]:
        return self._do(lambda: None)

    def drop_results(self, request_ids: list[str]) -> asyncio.Future[None]:
        def work() -> None:
            for history in self.rows.values():
                history.results = [each for each in history.results if each.request_id not in request_ids]

        return self._do(work)

    def flush(self) -> asyncio.Future[None]:
        return self._do(lambda: None)

    def histories(self) -> dict[str, RunHistory]:
        self.num_bytes = sum(len(e.payload) for history in self.rows.values() for e in history.entries)
        return {run_id: _copy(history) for run_id, history in self.rows.items()}

    def history(self, run_id: str) -> asyncio.Future[RunHistory]:
        return self._do(lambda: _copy(self.rows[run_id]))

    def _drop_entries(self, history: RunHistory, until: float = math.inf) -> None:
        self.num_bytes -= sum(len(e.payload) for e in history.entries if e.seq_id <= until)
        history.entries = [e for e in history.entries if e.seq_id > until]

    def _store(self, history: RunHistory, results: list[StoredResult]) -> None:
        known = {result.request_id for result in history.results}
        history.results += [result for result in results if result.request_id not in known]

    def _do(self, work: Callable[[], Any]) -> asyncio.Future[Any]:
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Any] = loop.create_future()
        delay = self._rng.choice([0, 0.001, 0.01, 0.2])
        self._ready_at = max(self._ready_at + 1e-6, loop.time() + delay)

        def commit() -> None:
            if self.fenced:
                if not future.done():
                    future.set_exception(Fenced("another coordinator has taken over"))
                    future.exception()
                return
            answer = work()
            if not future.done():
                future.set_result(answer)

        loop.call_at(self._ready_at, commit)
        return future


def _copy(history: RunHistory) -> RunHistory:
    """Other lists of the same rows, which nobody can change."""
    return RunHistory(*(list(getattr(history, each.name)) for each in fields(history)))


class MemoryFiles:
    """storage.states.StateFiles over the files of an EchoGroup."""

    def __init__(self, files: dict[str, Any]) -> None:
        self.files = files
        self.free = 2**40

    def free_bytes(self) -> int:
        return self.free

    def name_for(self, owner: str, detail: str) -> str:
        return f"{owner}.{detail}"

    def path(self, name: str) -> str:
        return f"/files/{name}"

    def exists(self, name: str) -> bool:
        return self.path(name) in self.files

    def remove(self, name: str) -> None:
        self.files.pop(self.path(name), None)

    def sweep(self, keep: list[str]) -> None:
        for path in set(self.files) - {self.path(name) for name in keep}:
            del self.files[path]
