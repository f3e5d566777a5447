"""What a run can be asked to do, in which order within one tick, and what it costs.

Knows the order in which a tick's fields are executed (protocol.work.Tick). Does not know runs or tenants.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from typing import Any

from twinkle_serve.control.backend import (
    Command,
    LoadCommand,
    OptimCommand,
    PassCommand,
    RejectedCommand,
    SaveCommand,
    SnapshotCommand,
    UnloadCommand,
)
from twinkle_serve.control.log import Entry


@dataclass(frozen=True, slots=True)
class BirthCommand:
    """What every run's log begins with: make its adapter, fresh or from the checkpoint at ``path``."""

    path: str | None = None
    optimizer: bool = False


@dataclass(frozen=True, slots=True)
class RestoreCommand:
    """Bring the run back from the file ``path``, which holds it as it was after seq_id ``covered``. Only
    recovery puts this into a log; what follows it was lost with the group and is done again."""

    path: str
    covered: int


@dataclass(frozen=True, slots=True)
class DoneCommand:
    """Was done, and must not be done again: its answer. Only recovery puts this into a log."""

    value: Any


RunCommand = Command | BirthCommand | RestoreCommand | DoneCommand
RunEntry = Entry[RunCommand]


class Stage(IntEnum):
    """How far one run has got within a tick; a tick does these in this order."""

    START = 0
    PASS = 1
    OPTIM = 2
    SAVE = 3
    CLOSED = 4


def next_stage(stage: Stage, command: RunCommand) -> Stage | None:
    """The run's stage once ``command`` joins its part of the tick, or None if it has to wait for the
    next tick because this one would execute it out of order."""
    match command:
        case RejectedCommand() | DoneCommand():
            return stage
        case BirthCommand() | RestoreCommand() | LoadCommand() | UnloadCommand():
            # Alone: what follows must see whether there is an adapter at all, or wait until that is sure.
            return Stage.CLOSED if stage is Stage.START else None
        case PassCommand():
            return Stage.PASS if stage <= Stage.PASS else None
        case OptimCommand():
            return Stage.OPTIM if stage < Stage.OPTIM else None
        case SaveCommand() | SnapshotCommand():
            return Stage.SAVE if stage <= Stage.SAVE else None


def num_tokens(command: RunCommand) -> int:
    """Tokens of the command's datums: only passes have any."""
    return sum(command.lengths) if isinstance(command, PassCommand) else 0


def cost(command: RunCommand) -> int:
    """What the command takes from a tick's token budget, and its tenant's share: only passes do."""
    return max(num_tokens(command), command.loss_tokens) if isinstance(command, PassCommand) else 0
