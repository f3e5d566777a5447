"""Which run is in which slot, and who makes room for whom.

Knows slots and least recent use. Does not know where the group keeps what is paged out, nor any tenant.
"""

from __future__ import annotations

import heapq
from collections.abc import Collection
from dataclasses import dataclass

from twinkle_serve.protocol.work import DropRun, PageIn, PageOut


@dataclass(frozen=True, slots=True)
class Placement:
    """The slots of the runs asked for, and the moves that put them there."""

    slots: dict[str, int]
    page_out: tuple[PageOut, ...]
    page_in: tuple[PageIn, ...]


class Residency:
    """A run is resident (in a slot), paged (kept by the group elsewhere) or unknown (nothing to keep)."""

    def __init__(self, max_slots: int) -> None:
        self.max_slots = max_slots
        self._free = list(range(max_slots))
        self._slots: dict[str, int] = {}  # the least recently used run first
        self._paged: set[str] = set()

    @property
    def num_resident(self) -> int:
        return len(self._slots)

    @property
    def num_paged(self) -> int:
        return len(self._paged)

    def place(self, run_ids: Collection[str]) -> Placement:
        """Give each of these (at most max_slots) runs a slot for the coming tick. A run that nothing is
        known of gets an empty slot: its adapter is created there in the same tick."""
        needed = set(run_ids)
        assert len(needed) <= self.max_slots
        absent = [run_id for run_id in run_ids if run_id not in self._slots]
        victims = iter([run_id for run_id in self._slots if run_id not in needed])
        page_out: list[PageOut] = []
        for _ in range(len(absent) - len(self._free)):
            page_out.append(self._page_out(next(victims)))
        page_in = [PageIn(self._occupy(run_id), run_id) for run_id in absent if run_id in self._paged]
        for run_id in run_ids:
            slot = self._slots.pop(run_id, None)
            self._slots[run_id] = self._occupy(run_id) if slot is None else slot
        self._paged -= needed
        return Placement({r: self._slots[r] for r in run_ids}, tuple(page_out), tuple(page_in))

    def occupied(self) -> list[tuple[int, str]]:
        """(slot, run) in the order of the slots."""
        return sorted((slot, run_id) for run_id, slot in self._slots.items())

    def slot_of(self, run_id: str) -> int | None:
        return self._slots.get(run_id)

    def knows(self, run_id: str) -> bool:
        """Whether the group has the run, in a slot or paged out."""
        return run_id in self._slots or run_id in self._paged

    def drop(self, run_id: str) -> DropRun | None:
        """Forget a run; what the group must do about it, or None if it has nothing of it. The slot is
        free for the tick that does it."""
        if run_id in self._slots:
            slot = self._slots.pop(run_id)
            heapq.heappush(self._free, slot)
            return DropRun(run_id, slot)
        if run_id in self._paged:
            self._paged.remove(run_id)
            return DropRun(run_id, None)
        return None

    def lose_all(self) -> list[str]:
        """The group is gone with everything in it: who was there."""
        lost = [*self._slots, *sorted(self._paged)]
        self._free = list(range(self.max_slots))
        self._slots.clear()
        self._paged.clear()
        return lost

    def _page_out(self, run_id: str) -> PageOut:
        slot = self._slots.pop(run_id)
        heapq.heappush(self._free, slot)
        self._paged.add(run_id)
        return PageOut(slot, run_id)

    def _occupy(self, run_id: str) -> int:
        slot = self._slots[run_id] = heapq.heappop(self._free)
        return slot
