"""Where one rank stands in its group: the contract between who starts ranks and the engine inside them.

Knows numbers and an address. Imports no torch, so that whoever starts ranks need not load it.

Every rank of a group builds ``Engine(config, place=RankPlace(...))`` and then runs the very same ticks in the
same order. Only rank 0's items count: what other ranks compute is gathered there inside the engine.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class RankPlace:
    """One rank of ``world_size``.

    address: where the ranks meet, ``tcp://host:port``; rank 0 listens there, so the port must be free on its
    host. timeout_s: longest wait in one collective, seconds; a peer that does not come in that time is an
    exception at all others, after which the group is of no use any more.
    """

    rank: int
    world_size: int
    address: str
    timeout_s: float

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.world_size:
            raise ValueError(f"rank {self.rank} of {self.world_size} ranks")
        if not self.address.startswith("tcp://"):
            raise ValueError(f"address {self.address!r} is not tcp://host:port")
