"""What is on disk of one run, what was done to it since, and when it is to be written to disk again.

Knows seq_ids, snapshots and the cost of doing things again. Does not know the journal or how a snapshot is
taken (keeper.py).
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from twinkle_serve.config import StorageConfig
from twinkle_serve.control.commands import RestoreCommand, RunEntry
from twinkle_serve.control.log import Entry
from twinkle_serve.control.runs import Run
from twinkle_serve.protocol.work import Failure
from twinkle_serve.storage.journal_rows import StoredSnapshot

UNBORN = -1  # what a run is covered up to before there is a snapshot; its birth has seq_id 0
# A snapshot may hold up the group for this share of the work that it saves from being done again.
_WORTH = 50


@dataclass(frozen=True, slots=True)
class Noted:
    """A request's outcome that the journal has, or soon will."""

    seq_id: int
    value: Any = None
    failure: Failure | None = None


@dataclass(frozen=True, slots=True)
class Untold:
    """A load that was done, and whose client is told once a snapshot has it."""

    seq_id: int
    request_id: str
    value: Any


@dataclass(slots=True)
class Kept:
    """One run.

    done: seq_ids executed since the older snapshot, ascending. snapshots: the newest first, at most two;
    bad: what those covered that turned out to be unreadable. dropped_until: the journal has no entries up to
    this. unstored: requests whose results the journal does not have, with their ids and whether the client
    numbered them. noted: by request, outcomes of what must not be done again; noting: the last failure among
    them that is not on disk yet. untold: a load behind which the run does not go on. num_rewinds: how often
    it was taken back to a snapshot. dirty_since: when the oldest change that no snapshot covers was made.
    debt_s: how long it took to do what no snapshot covers. hold_s: how long the last snapshot held up the
    tick that it was in. num_failed_restores: how often in a row the newest snapshot could not be put into
    a slot, though it may be whole.
    """

    run: Run
    done: list[int] = field(default_factory=list)
    snapshots: list[StoredSnapshot] = field(default_factory=list)
    bad: list[int] = field(default_factory=list)
    dropped_until: int = UNBORN
    unstored: dict[int, tuple[str, bool]] = field(default_factory=dict)
    noted: dict[str, Noted] = field(default_factory=dict)
    noting: asyncio.Future[None] | None = None
    untold: Untold | None = None
    num_steps: int = 0
    debt_s: float = 0.0
    hold_s: float = 0.0
    num_failed_restores: int = 0
    num_rewinds: int = 0
    dirty_since: float | None = None
    not_before: float = 0.0
    is_urgent: bool = False
    is_persisting: bool = False
    is_restoring: bool = False
    is_rewinding: bool = False
    is_parking: bool = False

    @property
    def covered(self) -> int:
        return self.snapshots[0].covered if self.snapshots else UNBORN

    @property
    def executed(self) -> int:
        return self.done[-1] if self.done else self.covered

    @property
    def to_redo(self) -> list[int]:
        """What the newest snapshot does not have, in order."""
        return [seq_id for seq_id in self.done if seq_id > self.covered]

    def restore_entry(self, path: str) -> RunEntry:
        """Belongs in front of what is to be redone."""
        self.is_restoring = True
        return Entry(self.covered, f"restore {self.run.run_id}", RestoreCommand(path, self.covered))

    def listed(self, snapshots: list[StoredSnapshot], drop_until: int) -> None:
        """These are its snapshots now. The journal has no entries up to ``drop_until`` any more, and the
        results of all that the newest covers."""
        self.snapshots, self.bad, self.dropped_until = snapshots, [], drop_until
        self.done = [seq_id for seq_id in self.done if seq_id > drop_until]
        self.noted = {each: noted for each, noted in self.noted.items() if noted.seq_id > drop_until}
        self.unstored = {seq_id: each for seq_id, each in self.unstored.items() if seq_id > self.covered}

    def seq_id_of(self, request_id: str) -> int:
        """Of a request that is pending."""
        return next(seq_id for seq_id, (each, _) in self.unstored.items() if each == request_id)

    def is_untold(self, request_id: str) -> bool:
        return self.untold is not None and self.untold.request_id == request_id

    def untold_until(self, seq_id: int) -> Untold | None:
        """The load that waits for a snapshot, if one that covers ``seq_id`` has it."""
        return self.untold if self.untold is not None and self.untold.seq_id <= seq_id else None

    def begin_snapshot(self) -> None:
        """What is done up to now will be in it."""
        self.is_persisting, self.is_urgent = True, False
        self.num_steps, self.debt_s, self.dirty_since = 0, 0.0, None

    def may_persist(self, now: float) -> bool:
        """Whether there is something new, and a whole adapter that has it."""
        return (
            self.dirty_since is not None
            and self.executed > self.covered
            and self.run.down is None
            and not self.is_persisting
            and not self.is_restoring
            and now >= self.not_before
        )

    def is_due(self, config: StorageConfig, now: float) -> bool:
        if not self.may_persist(now):
            return False
        assert self.dirty_since is not None
        return (
            self.is_urgent
            or self.num_steps >= config.snapshot_every_steps
            or now - self.dirty_since >= config.snapshot_every_s
        )


def due(runs: Sequence[Kept], config: StorageConfig, now: float) -> list[str]:
    """Which of a group's runs should be snapshotted now: those whose time has come, and, once to do all again
    would take too long, the one that would take longest."""
    chosen = [kept for kept in runs if kept.is_due(config, now)]
    if sum(kept.debt_s for kept in runs) >= config.snapshot_replay_s:
        able = [kept for kept in runs if kept.may_persist(now) and kept.debt_s > _WORTH * kept.hold_s]
        most = max(able, key=lambda kept: kept.debt_s, default=None)
        if most is not None and most not in chosen:
            chosen.append(most)
    return [kept.run.run_id for kept in chosen]
