"""Accepting a request: its promise is opened if there is room, and its client told once it is on disk.

Knows promises, quotas and the journal's keeper. Does not know what is asked for or who will do it.
"""

from __future__ import annotations

from twinkle_serve.control.books import Books
from twinkle_serve.control.keeper import Keeper
from twinkle_serve.control.room import check_room
from twinkle_serve.protocol.errors import CAPACITY, BackendUnavailable, Busy
from twinkle_serve.protocol.work import Failure

STOPPING = Failure("the server is shutting down", "server")
_RESULTS = (
    "this server's room for results is full, and yours take more than your part of it; it empties as they "
    "are fetched or grow old"
)


class Acceptance:
    """Set ``closed`` to accept nothing more. keeper: None where nothing is journaled."""

    def __init__(self, books: Books, keeper: Keeper | None) -> None:
        self._books = books
        self._keeper = keeper
        self.closed = False

    def open(
        self, tenant: str, origin: tuple[str, str, int | None], sampling: bool = False, num_bytes: int = 0
    ) -> str:
        """A promise for what ``origin`` asks. Raises Busy or BackendUnavailable."""
        self._check_open(tenant)
        if sampling:
            self._books.quotas.check_room(tenant, num_bytes)
        request_id = self._books.promises.open(tenant, origin, sampling, num_bytes)
        self._books.watch.accepted(request_id, tenant, origin)
        return request_id

    def failed(self, tenant: str, failure: Failure | None) -> str:
        """A promise that has failed already. Raises Busy or BackendUnavailable."""
        self._check_open(tenant)
        request_id = self._books.promises.open(tenant, None)
        self._books.fail(request_id, failure or Failure("this model_seq_id is taken by an older run"))
        return request_id

    async def durable(self, request_id: str) -> str:
        """The id, once the request is on disk."""
        if self._keeper is not None:
            await self._keeper.durable(request_id)
        return request_id

    def check_room(self, tenant: str) -> None:
        """Raises BackendUnavailable or Busy where nothing more is accepted, for want of room in the journal
        too. For those who make something before they can ``open``: a refusal must not leave it behind."""
        self._check_open(tenant)
        if self._keeper is not None:
            check_room(self._keeper)

    def _check_open(self, tenant: str) -> None:
        if self.closed:
            raise BackendUnavailable(STOPPING.message)
        if self._books.promises.is_full(tenant):
            raise Busy(_RESULTS, CAPACITY)
