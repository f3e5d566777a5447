"""What the control plane needs from a group of ranks: run a tick, stream its outcomes.

The Ray group (cluster/group.py) and the in-process one (engine behind a thread) both offer this.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Protocol

from twinkle_serve.protocol.work import Failure, ModelInfo, Outcome, Progress, Tick, TickReport


class Group(Protocol):
    """One base model and its slots."""

    @property
    def info(self) -> ModelInfo: ...

    def run(self, tick: Tick) -> AsyncIterator[Outcome | Progress | TickReport]:
        """Outcomes and progress as they are ready, in any order, then one TickReport. Outcomes of saves may
        come in a later tick's stream, and those of samples whenever they finish. ``Outcome.value`` may be a
        handle that the gateway resolves (a Ray ObjectRef). Raises GroupLost when the ranks are gone."""
        ...

    async def check_loss(self, graph: str) -> Failure | None:
        """Try an uploaded loss (text of protocol.loss_graph) on made-up data; what is wrong with it, if
        anything. Raises GroupLost when there is no rank to try it."""
        ...

    async def rebuild(self) -> ModelInfo:
        """After GroupLost: start new ranks. Every slot is empty afterwards and nothing is paged out."""
        ...


class GroupLost(Exception):
    """The group's processes died or hung; what was resident in its slots is gone."""
