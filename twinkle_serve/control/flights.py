"""Requests on their way through the group, and the tick in which they leave.

Knows what is to be done when an outcome comes. Does not know how commands become ticks (assembly.py) nor
when ticks run (driver.py).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from twinkle_serve.control.microbatches import Load
from twinkle_serve.protocol.work import (
    CreateAdapter,
    DropRun,
    Failure,
    LoadAdapter,
    OptimStep,
    Outcome,
    Pass,
    PersistRun,
    RestoreRun,
    SaveAdapter,
    Snapshot,
)

INTERNAL_ERROR = Failure("internal error in the control plane; the server's log has the details", "server")


class Proof(Enum):
    """What must be on disk before a client may read a request's outcome: see telling.py."""

    NOTHING = "nothing"
    FAILURE = "a note of its failure"
    OUTCOME = "a note of its outcome"
    SNAPSHOT = "a note of its failure, or a snapshot that has what it did"


def _same(value: Any) -> Any:
    return value


def _ignore(failure: Failure) -> None:
    pass


def _nothing() -> None:
    pass


@dataclass(frozen=True, slots=True)
class Flight:
    """One request on its way through the group.

    on_value: takes note of success and turns the group's value into the client's. on_failure: takes note.
    on_lost: frees what it holds; the group died, and whether the request is done again is not said here.
    proof: what its answer has to wait for. outlives_tick: its outcome may come with a later tick (saves and
    samples). num_sequences: of a sample, those of ``tenant``'s that it may have decoded at once, and 0 for
    what is none; a sample that gets lost the client may simply submit again.
    """

    request_id: str
    on_value: Callable[[Any], Any] = _same
    on_failure: Callable[[Failure], None] = _ignore
    on_lost: Callable[[], object] = _nothing
    proof: Proof = Proof.NOTHING
    outlives_tick: bool = False
    num_sequences: int = 0
    tenant: str = ""


@dataclass(slots=True)
class Assembly:
    """A tick in the making. ``flights``: what the group will answer; ``verdicts``: what is decided
    without it, to be told after what comes before in the run's order; ``proofs``: what those wait for."""

    flights: dict[str, Flight] = field(default_factory=dict)
    verdicts: list[Outcome] = field(default_factory=list)
    proofs: dict[str, Proof] = field(default_factory=dict)
    drops: list[DropRun] = field(default_factory=list)
    creates: list[CreateAdapter] = field(default_factory=list)
    loads: list[LoadAdapter] = field(default_factory=list)
    passes: list[Pass] = field(default_factory=list)
    lengths: list[Sequence[int]] = field(default_factory=list)
    optim_steps: list[OptimStep] = field(default_factory=list)
    saves: list[SaveAdapter] = field(default_factory=list)
    snapshots: list[Snapshot] = field(default_factory=list)
    restores: list[RestoreRun] = field(default_factory=list)
    persists: list[PersistRun] = field(default_factory=list)

    @property
    def pass_loads(self) -> list[Load]:
        return [Load(p.slot, p.backward, n) for p, n in zip(self.passes, self.lengths, strict=True)]
