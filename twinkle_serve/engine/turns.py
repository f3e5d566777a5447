"""Whose turn it is in the sampler, and who makes room: no tenant's long answers shut the others out.

Knows tenants, and how many tokens were read and drawn for each while it had something to do. Does not know
how much room there is (sampler.py), nor tenants' weights and rates: those bound what comes in (control/).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import TypeVar

from twinkle_serve.engine.sequences import Job, Sequence

J = TypeVar("J", Job, Sequence)


class Turns:
    """The tenant that was served least goes first; a tenant's own keep their order."""

    def __init__(self) -> None:
        self._served: dict[str, int] = {}

    def enter(self, tenant: str, present: set[str]) -> None:
        """Whoever comes anew begins where the least served of those ``present`` is: nothing is saved up."""
        if tenant not in present:
            self._served = {name: self._served[name] for name in present}
            self._served[tenant] = min(self._served.values(), default=0)

    def served(self, tenant: str, num_tokens: int) -> None:
        self._served[tenant] += num_tokens

    def in_turn(self, items: Iterable[J]) -> list[J]:
        return sorted(items, key=lambda item: self._served[item.tenant])

    def admissible(self, waiting: Iterable[Job], running: Iterable[Job], max_rows: int) -> list[Job]:
        """Those that may start now, in turn. A tenant that has nothing running need not wait for room."""
        counts = rows_of(running)
        free = max_rows - counts.total()
        found: list[Job] = []
        for job in self.in_turn(waiting):
            if job.num_rows > free and counts[job.tenant]:
                free = 0  # or a large one would wait for as long as small ones come
                continue
            found.append(job)
            counts[job.tenant] += job.num_rows
            free -= job.num_rows
        return found


def rows_of(items: Iterable[Job | Sequence]) -> Counter[str]:
    """Sequences that are not over, by tenant."""
    counts: Counter[str] = Counter()
    for item in items:
        counts[item.tenant] += item.num_rows
    return counts


def is_crowded(tenant: str, rows: Counter[str], max_rows: int) -> bool:
    """Whether one more of this tenant has to wait because others are there too. The first never has."""
    return rows.total() >= max_rows and 0 < rows[tenant] < rows.total()


def youngest_of_most(decoding: list[Sequence]) -> Sequence:
    """Of the tenant with the most that are decoded."""
    rows = rows_of(decoding)
    most = max(rows.values())
    return next(sequence for sequence in reversed(decoding) if rows[sequence.tenant] == most)


def in_the_way_of(blocked: Sequence, decoding: list[Sequence]) -> Sequence | None:
    """Which one is to make room for the first of a tenant. None if that has one, or no other has two: the
    rest wait for an end, so no two ever push each other out in turn."""
    rows = rows_of(decoding)
    if rows[blocked.tenant] or max(rows.values(), default=0) < 2:
        return None
    return youngest_of_most(decoding)
