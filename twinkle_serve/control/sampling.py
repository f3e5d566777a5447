"""Samples on their way: from sampling sessions or straight from a model, given up when nobody asks any more.

Knows who asked for which sample last, and what each holds on to. Does not know how tokens are drawn, nor how
long a client is patient.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from twinkle_serve.config import LimitsConfig
from twinkle_serve.control.backend import Ended, Invalid
from twinkle_serve.control.books import Books
from twinkle_serve.control.checkpoints import key_of, path_of
from twinkle_serve.control.completions import CLONE_SIZE, Completions, Key, line_of
from twinkle_serve.control.driver import GroupDriver
from twinkle_serve.control.flights import Flight
from twinkle_serve.control.samplers import Sampler
from twinkle_serve.protocol.data import SampleRequest
from twinkle_serve.protocol.work import AdapterRef, Failure, Sample
from twinkle_serve.storage.records import CheckpointRecord

OpenPromise = Callable[[str, tuple[str, str, int | None], int], str]
"""(tenant, origin, bytes held until it is settled) -> request id. Raises Busy where memory is short."""


@dataclass(slots=True)
class _Pending:
    """A sample that is not over. ``num_waiting``: polls that are being held for it. ``line``: where its end
    is told to a client that waits for all of its samples at once."""

    tenant: str
    driver: GroupDriver
    session_id: str | None
    asked_at: float
    line: Key | None
    num_waiting: int = 0


class Sampling:
    """All samples of all tenants. ``driver_of``: the group for a base model's samples, or the one that is
    named by a snapshot's home; raises NotFound. ``open_promise`` makes sampling promises.

    Clients that die say nothing: they just stop polling. A sample that nobody asked for in
    ``limits.sample_abandon_s`` is dropped, as if its worker had died, so that a client which was only
    asleep submits it again.
    """

    def __init__(
        self,
        books: Books,
        limits: LimitsConfig,
        driver_of: Callable[[str, str | None], GroupDriver],
        open_promise: OpenPromise,
        path_of: Callable[[str], str | None] | None = None,
    ) -> None:
        """path_of: a snapshot's file, if it is on disk by now; None where snapshots are not written."""
        self._books = books
        self._limits = limits
        self._driver_of = driver_of
        self._open_promise = open_promise
        self._path_of = path_of or (lambda sampler_id: None)
        self._pending: OrderedDict[str, _Pending] = OrderedDict()  # the longest unasked for first
        self._completions = Completions(books.promises, books.clock, time.time())

    def __len__(self) -> int:
        return len(self._pending)

    def submit(
        self, tenant: str, sampler_id: str, seq_id: int | None, request: SampleRequest | Failure
    ) -> tuple[str, list[str]]:
        """See Backend.sample."""
        known = self._books.samplers.get(tenant, sampler_id).requests
        if seq_id is not None and seq_id in known:
            return _with_sequence_ids(*known[seq_id])
        # First, as a snapshot of a model that is still loading is not gone.
        driver = self._driver_of(self._books.samplers.get(tenant, sampler_id).record.base_model, None)
        sampler = self._books.samplers.usable(tenant, sampler_id)
        # A snapshot is in the group that made it; other weights can be loaded by any.
        source = self._books.samplers.source(sampler)
        adapter = None if isinstance(request, Failure) else self._adapter(source)
        if adapter is not None and source.record.snapshot is not None and driver.name != source.home:
            path = self._path_of(source.record.sampler_id) if driver.samples_only else None
            adapter = replace(adapter, directory=path or adapter.directory)
            if path is None:
                driver = self._driver_of(sampler.record.base_model, source.home)
        num_bytes = 0 if isinstance(request, Failure) else request.num_bytes
        request_id = self._open_promise(tenant, ("sampler", sampler_id, seq_id), num_bytes)
        num_samples = 1 if isinstance(request, Failure) else request.num_samples
        if seq_id is not None:
            sampler.requests[seq_id] = request_id, num_samples
        if not isinstance(request, Failure) and num_samples > self._limits.max_num_samples:
            request = Failure(f"num_samples {num_samples} is above {self._limits.max_num_samples}")
        if isinstance(request, Failure):
            self._books.fail(request_id, request)
        else:
            self._start(Sample(request_id, tenant, adapter, request), driver, source)
        return _with_sequence_ids(request_id, num_samples)

    def submit_to_model(
        self,
        tenant: str,
        base_model: str | None,
        model_path: str | None,
        request: SampleRequest,
        stream: bool,
    ) -> str:
        """See Backend.sample_model."""
        adapter = None
        if model_path is not None:
            source = self._books.checkpoints.find(tenant, model_path)
            base_model, adapter = source.base_model, _checkpoint_ref(source)
        if base_model is None:
            raise Invalid("one of base_model and model_path is needed")
        if request.num_samples > self._limits.max_num_samples:
            raise Invalid(f"num_samples {request.num_samples} is above {self._limits.max_num_samples}")
        driver = self._driver_of(base_model, None)
        request_id = self._open_promise(tenant, ("model", base_model, None), request.num_bytes)
        self._start(Sample(request_id, tenant, adapter, request, stream), driver, None)
        return request_id

    def cancel(self, tenant: str, request_id: str) -> None:
        """Nothing happens if it is over, or another tenant's."""
        pending = self._pending.get(request_id)
        if pending is not None and pending.tenant == tenant:
            pending.driver.cancel(tenant, request_id)

    @contextmanager
    def asked_for(self, request_id: str) -> Iterator[None]:
        """Its owner waits for this request while the block lasts."""
        pending = self._pending.get(request_id)
        if pending is None:
            yield
            return
        pending.num_waiting += 1
        try:
            yield
        finally:
            pending.num_waiting -= 1
            pending.asked_at = self._books.clock.now()
            if request_id in self._pending:
                self._pending.move_to_end(request_id)

    async def poll_all(
        self, tenant: str, sampler_id: str, clone: int, cursor: int, timeout_s: float
    ) -> tuple[tuple[Ended, ...], int] | None:
        """See Backend.poll_samples."""
        requests = self._books.samplers.get(tenant, sampler_id).requests
        known = [answer[0] for seq_id, answer in requests.items() if seq_id // CLONE_SIZE == clone]
        completions, key = self._completions, (sampler_id, clone)
        if timeout_s > 0 and not completions.is_of_this_life(cursor, len(known)):
            return None
        found = completions.since(key, cursor, known)
        if found[0] or timeout_s <= 0:
            return found
        with completions.waiting(key) as news:
            timer = self._books.clock.call_later(timeout_s, news.set)
            try:
                await news.wait()
            finally:
                timer.cancel()
        return completions.since(key, cursor, known)

    def end_session(self, session_id: str) -> None:
        """Its client said goodbye, or has been silent for too long."""
        for request_id in [key for key, item in self._pending.items() if item.session_id == session_id]:
            self._give_up(request_id)

    def sweep(self) -> None:
        """Give up what nobody has asked for in a long time."""
        self._completions.sweep()
        limit = self._books.clock.now() - self._limits.sample_abandon_s
        abandoned = []
        for request_id, pending in list(self._pending.items()):
            if pending.asked_at > limit:
                break
            asked_at = None if pending.line is None else self._completions.asked_at(pending.line)
            if asked_at is not None and asked_at > limit:
                pending.asked_at = asked_at
                self._pending.move_to_end(request_id)
            elif pending.num_waiting == 0:
                abandoned.append(request_id)
        for request_id in abandoned:
            self._give_up(request_id)

    def _give_up(self, request_id: str) -> None:
        pending = self._pending.get(request_id)
        if pending is not None:
            self._books.promises.lose(request_id, self._books.clock.now())
            pending.driver.cancel(pending.tenant, request_id)

    def _start(self, work: Sample, driver: GroupDriver, sampler: Sampler | None) -> None:
        """Hold on to the weights until the sample is over, however it ends."""
        samplers, checkpoints = self._books.samplers, self._books.checkpoints
        directory = None if work.adapter is None else work.adapter.directory
        if sampler is not None:
            samplers.started(sampler.record.sampler_id)
        if directory is not None:
            checkpoints.pin(directory)

        def over(value: Any = None) -> Any:
            self._pending.pop(work.request_id, None)
            if sampler is not None:
                samplers.ended(sampler.record.sampler_id)
            if directory is not None:
                checkpoints.unpin(directory)
            driver.wake()
            return value

        session_id = None if sampler is None else sampler.record.session_id
        now = self._books.clock.now()
        line = line_of(self._books.promises.origin(work.request_id))
        self._pending[work.request_id] = _Pending(work.tenant, driver, session_id, now, line)
        flight = Flight(
            work.request_id,
            over,
            over,
            over,
            outlives_tick=True,
            num_sequences=work.request.num_samples,
            tenant=work.tenant,
        )
        driver.sample(work, flight)

    def _adapter(self, sampler: Sampler) -> AdapterRef | None:
        record = sampler.record
        if record.snapshot is not None:
            return AdapterRef(record.snapshot, sampler.path)
        if record.model_path is None:
            return None
        return _checkpoint_ref(self._books.checkpoints.find(record.tenant, record.model_path))


def _with_sequence_ids(request_id: str, num_samples: int) -> tuple[str, list[str]]:
    return request_id, [f"{request_id}-{i}" for i in range(num_samples)]


def _checkpoint_ref(source: CheckpointRecord) -> AdapterRef:
    """A checkpoint that is overwritten becomes another adapter."""
    return AdapterRef(f"{path_of(key_of(source))}@{source.created_at!r}", source.directory)
