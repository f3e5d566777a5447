"""Making uploaded losses: each is tried once in a rank before anybody may train with it.

Knows sessions and their losses. Does not know what a graph says (engine/graph_loss.py).
"""

from __future__ import annotations

import asyncio

from twinkle_serve.control.acceptance import Acceptance
from twinkle_serve.control.books import Books
from twinkle_serve.control.clock import Clock
from twinkle_serve.control.custom_losses import loss_id_for
from twinkle_serve.control.group import GroupLost
from twinkle_serve.control.groups import Drivers
from twinkle_serve.control.polling import RECOVERING
from twinkle_serve.protocol.errors import BackendUnavailable
from twinkle_serve.protocol.work import Failure
from twinkle_serve.storage.records import LossRecord


class LossMaking:
    """See control.backend.Backend for what ``create_custom_loss`` promises."""

    def __init__(self, books: Books, drivers: Drivers, accept: Acceptance, clock: Clock) -> None:
        self._books = books
        self._drivers = drivers
        self._accept = accept
        self._clock = clock
        self._making: dict[str, asyncio.Future[str]] = {}
        # A rank does what it is asked in turn: many trials at once would all go before the next tick.
        self._trial = asyncio.Lock()

    async def create_custom_loss(
        self, tenant: str, session_id: str, custom_loss_seq_id: int, graph: str | Failure
    ) -> str:
        session = self._books.sessions.usable(tenant, session_id, self._clock.now())
        loss_id = loss_id_for(session.record.session_id, custom_loss_seq_id)
        making = self._making.get(loss_id)
        if making is None:
            making = asyncio.ensure_future(self._make_loss(tenant, session_id, loss_id, graph))
            self._making[loss_id] = making
            making.add_done_callback(lambda _: self._making.pop(loss_id))
        return await asyncio.shield(making)

    async def _make_loss(self, tenant: str, session_id: str, loss_id: str, graph: str | Failure) -> str:
        known = self._books.losses.find(loss_id)
        if known is not None:
            return known.request_id
        if isinstance(graph, Failure):
            return self._accept.failed(tenant, graph)
        try:
            async with self._trial:
                failure = await next(iter(self._drivers.values())).group.check_loss(graph)
        except GroupLost:
            raise BackendUnavailable(RECOVERING) from None
        if failure is not None:
            return self._accept.failed(tenant, failure)
        now = self._clock.now()
        request_id = self._books.promises.open(tenant, None)
        self._books.losses.add(LossRecord(loss_id, session_id, tenant, now, request_id, graph))
        self._books.resolve(request_id, {"loss_id": loss_id})
        return request_id
