"""Samples that wait to be admitted to the group's decoder: one queue a tenant, taken in turn.

Knows how many sequences of whom are being decoded. Does not know prompts or adapters, nor which of those that
were admitted are decoded first (engine/turns.py).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Generic, TypeVar

S = TypeVar("S")


class SampleQueue(Generic[S]):
    """Holds back what the decoder has no room for, so that two thousand samples of one tenant do not
    stand before the first of another.

    A full room keeps nobody out who has less than their share of it, by weight among those who are in it or
    wait, or nothing: long answers of some may not be all that there is for hours. So more than
    ``max_sequences`` may be admitted, by a logarithm of the number of tenants and a request of each.
    """

    def __init__(self, max_sequences: int, weight: Callable[[str], float] = lambda tenant: 1.0) -> None:
        self._max_sequences = max_sequences
        self._weight = weight
        self._tenants: dict[str, dict[str, tuple[int, S]]] = {}  # whose turn it is first

    @property
    def is_empty(self) -> bool:
        return not self._tenants

    def __len__(self) -> int:
        return sum(len(queue) for queue in self._tenants.values())

    def position(self, tenant: str, request_id: str) -> int | None:
        """How many samples are admitted up to and with this one; None if it does not wait."""
        queue = self._tenants.get(tenant, {})
        if request_id not in queue:
            return None
        place = list(queue).index(request_id) + 1
        turn = list(self._tenants).index(tenant)
        return sum(min(len(q), place - (i > turn)) for i, q in enumerate(self._tenants.values()))

    def has(self, tenant: str, request_id: str) -> bool:
        return request_id in self._tenants.get(tenant, ())

    def push(self, tenant: str, request_id: str, num_sequences: int, sample: S) -> None:
        self._tenants.setdefault(tenant, {})[request_id] = (num_sequences, sample)

    def remove(self, tenant: str, request_id: str) -> S | None:
        """Take back a sample that was not admitted yet; None if it was."""
        queue = self._tenants.get(tenant, {})
        item = queue.pop(request_id, None)
        if item is not None and not queue:
            del self._tenants[tenant]
        return None if item is None else item[1]

    def take(
        self, active: Mapping[str, int], must_wait: Callable[[str], object] = lambda tenant: False
    ) -> Iterator[S]:
        """Admit samples, one of each tenant in turn, while there is room beside the ``active`` sequences of
        each tenant. Tenants that must wait are passed over and keep their turn; they are asked about again
        after each sample."""
        counts = Counter(active)
        present = self._tenants.keys() | counts.keys()
        per_weight = self._max_sequences / (sum(map(self._weight, present)) or 1)
        while tenant := self._next(counts, per_weight, must_wait):
            queue = self._tenants[tenant]
            request_id = next(iter(queue))
            num_sequences, sample = queue.pop(request_id)
            counts[tenant] += num_sequences
            del self._tenants[tenant]
            if queue:
                self._tenants[tenant] = queue
            yield sample

    def _next(
        self, counts: Counter[str], per_weight: float, must_wait: Callable[[str], object]
    ) -> str | None:
        """Whose turn it is. Once somebody waits for room, others only go within their shares."""
        free = self._max_sequences - counts.total()
        for tenant, queue in self._tenants.items():
            if must_wait(tenant):
                continue
            num_sequences, _ = next(iter(queue.values()))
            own, share = counts[tenant], per_weight * self._weight(tenant)
            if not own or num_sequences <= free or own + num_sequences <= share:
                return tenant
            free = 0
        return None

    def drain(self) -> list[S]:
        """Empty the queue; all that waited."""
        waiting = [sample for queue in self._tenants.values() for _, sample in queue.values()]
        self._tenants.clear()
        return waiting
