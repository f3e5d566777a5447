"""How much one tenant may ask of one ingress replica at a time: requests, and bytes of their bodies.

Counts who is inside. Does not know what a request is about, and keeps nothing that another replica would
need.
"""

from __future__ import annotations

import asyncio
from collections import Counter, deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from twinkle_serve.config import TenantLimits
from twinkle_serve.protocol.errors import Busy


@dataclass(slots=True)
class _Line:
    """Bytes that a tenant's bodies hold, and who waits for how many, the first in front."""

    held: int = 0
    waiting: deque[tuple[int, asyncio.Future[None]]] = field(default_factory=deque)


class Doors:
    """Those of one replica. Everything runs on its event loop."""

    def __init__(self) -> None:
        self._inside: Counter[str] = Counter()
        self._lines: dict[str, _Line] = {}

    @contextmanager
    def visit(self, tenant: str, limits: TenantLimits) -> Iterator[Visit]:
        """Be inside while the block lasts. Raises Busy when too many of the tenant's requests are."""
        if self._inside[tenant] >= limits.http_requests:
            raise Busy(f"{limits.http_requests} of your HTTP requests are being answered; send fewer at once")
        self._inside[tenant] += 1
        visit = Visit(self, tenant, limits)
        try:
            yield visit
        finally:
            visit.leave()
            self._inside[tenant] -= 1
            if not self._inside[tenant]:
                del self._inside[tenant]

    async def take(self, tenant: str, num_bytes: int, most: int) -> None:
        """Wait in line until there is room; a body larger than ``most`` goes when it is the only one."""
        line = self._lines.setdefault(tenant, _Line())
        if line.waiting or (line.held and line.held + num_bytes > most):
            turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            line.waiting.append((num_bytes, turn))
            try:
                await turn
            except asyncio.CancelledError:
                if turn.done() and not turn.cancelled():
                    self.give_back(tenant, num_bytes, most)
                raise
        else:
            line.held += num_bytes

    def give_back(self, tenant: str, num_bytes: int, most: int) -> None:
        line = self._lines[tenant]
        line.held -= num_bytes
        while line.waiting:
            wanted, turn = line.waiting[0]
            if line.held and line.held + wanted > most:
                break
            line.waiting.popleft()
            if not turn.cancelled():
                line.held += wanted
                turn.set_result(None)
        if not line.held and not line.waiting:
            del self._lines[tenant]


class Visit:
    """One request inside."""

    def __init__(self, doors: Doors, tenant: str, limits: TenantLimits) -> None:
        self._doors, self._tenant, self._most = doors, tenant, limits.bodies_bytes
        self._held = 0

    async def hold(self, num_bytes: int) -> None:
        """Wait for room for a body of so many bytes; it is given back when the visit ends."""
        if num_bytes:
            await self._doors.take(self._tenant, num_bytes, self._most)
            self._held += num_bytes

    def leave(self) -> None:
        if self._held:
            self._doors.give_back(self._tenant, self._held, self._most)
            self._held = 0
