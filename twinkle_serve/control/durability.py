"""What the control plane survives with: a journal, files for snapshots, and how to get at results.

Knows what these must be able to do. Does not know how storage does it, or what is written when (keeper.py).
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, Protocol

from twinkle_serve.storage.journal_rows import JournalEntry, RunHistory, StoredResult, StoredSnapshot


class JournalLike(Protocol):
    """storage.journal.Journal, or a stand-in for it."""

    stalled: str | None
    num_bytes: int

    def append(self, entry: JournalEntry) -> asyncio.Future[None]: ...
    def cover(
        self,
        snapshot: StoredSnapshot,
        results: list[StoredResult],
        drop_until: int,
        drop_snapshots: list[int],
    ) -> asyncio.Future[None]: ...
    def retire(self, run_id: str, results: list[StoredResult]) -> asyncio.Future[None]: ...
    def expire_results(self, settled_before: float) -> asyncio.Future[None]: ...
    def drop_results(self, request_ids: list[str]) -> asyncio.Future[None]: ...
    def flush(self) -> asyncio.Future[None]: ...
    def histories(self) -> dict[str, RunHistory]: ...
    def history(self, run_id: str) -> asyncio.Future[RunHistory]: ...


class FilesLike(Protocol):
    """storage.states.StateFiles, or a stand-in for it."""

    def name_for(self, owner: str, detail: str) -> str: ...
    def path(self, name: str) -> str: ...
    def exists(self, name: str) -> bool: ...
    def free_bytes(self) -> int: ...
    def remove(self, name: str) -> None: ...
    def sweep(self, keep: list[str]) -> None: ...


async def _as_it_is(value: Any) -> Any:
    return value


def _nothing() -> None:
    pass


@dataclass(frozen=True, slots=True)
class Durability:
    """What the control plane survives with. resolve: turns a handle among results into the result. fenced:
    called when another coordinator has taken over."""

    journal: JournalLike
    files: FilesLike
    resolve: Callable[[Any], Awaitable[Any]] = _as_it_is
    fenced: Callable[[], object] = _nothing
