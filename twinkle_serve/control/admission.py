"""Samples that wait to be admitted to the group's decoder: one queue a tenant, taken in turn.

Knows how many sequences are being decoded. Does not know prompts or adapters.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

S = TypeVar("S")


class SampleQueue(Generic[S]):
    """Holds back what the decoder has no room for, so that two thousand samples of one tenant do not
    stand before the first of another."""

    def __init__(self, max_sequences: int) -> None:
        self._max_sequences = max_sequences
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

    def take(self, num_active: int, must_wait: Callable[[str], object] = lambda tenant: False) -> Iterator[S]:
        """Admit samples, one of each tenant in turn, while there is room beside ``num_active`` sequences.
        A request larger than the whole room goes when nothing is active. Tenants that must wait are passed
        over and keep their turn; they are asked about again after each sample."""
        while tenant := next((name for name in self._tenants if not must_wait(name)), None):
            queue = self._tenants[tenant]
            request_id = next(iter(queue))
            num_sequences, sample = queue[request_id]
            if num_active and num_active + num_sequences > self._max_sequences:
                break
            num_active += num_sequences
            del queue[request_id]
            del self._tenants[tenant]
            if queue:
                self._tenants[tenant] = queue
            yield sample

    def drain(self) -> list[S]:
        """Empty the queue; all that waited."""
        waiting = [sample for queue in self._tenants.values() for _, sample in queue.values()]
        self._tenants.clear()
        return waiting
