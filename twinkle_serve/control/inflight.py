"""The requests that a group is at work on, and what becomes of each: settled, lost, or given no answer.

Knows flights, and samples among them by their sequences. Does not know how a tick is made or run (driver.py),
nor what must be on disk before a client is told (telling.py).
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from functools import partial

from twinkle_serve.control.books import Books
from twinkle_serve.control.commands import RunEntry
from twinkle_serve.control.flights import INTERNAL_ERROR, Assembly, Flight, Proof
from twinkle_serve.control.keeper import Keeper
from twinkle_serve.control.planner import Window
from twinkle_serve.control.suspects import Suspects
from twinkle_serve.control.telling import proof_of, tell, when_sure
from twinkle_serve.protocol.work import Failure, Outcome, TickReport

logger = logging.getLogger(__name__)
_SILENT = Failure("the workers gave no answer to this request", "server")


class InFlight:
    """One group's. ``wake``: something may start that waited for a request which is over."""

    def __init__(
        self, books: Books, keeper: Keeper | None, suspects: Suspects, wake: Callable[[], object]
    ) -> None:
        self._books = books
        self._keeper = keeper
        self._suspects = suspects
        self._wake = wake
        self._flights: dict[str, Flight] = {}
        self._num_silent_reports = 0
        self._era = 0  # how often the group was lost
        self.sequences: Counter[str] = Counter()
        """Of samples, by tenant."""

    @property
    def num_sequences(self) -> int:
        return self.sequences.total()

    def __len__(self) -> int:
        return len(self._flights)

    def __contains__(self, request_id: object) -> bool:
        return request_id in self._flights

    def __iter__(self) -> Iterator[str]:
        return iter(self._flights)

    def any_of(self, run_id: str) -> bool:
        return any(self._books.promises.run_of(request_id) == run_id for request_id in self._flights)

    def add(self, flights: Mapping[str, Flight]) -> None:
        """Those that are in flight already are left alone."""
        for request_id, flight in flights.items():
            if request_id not in self._flights:
                self._flights[request_id] = flight
                self._count(flight, flight.num_sequences)

    def _count(self, flight: Flight, change: int) -> None:
        self.sequences[flight.tenant] += change
        if not self.sequences[flight.tenant]:
            del self.sequences[flight.tenant]

    def settle(self, outcome: Outcome) -> None:
        """Nothing happens if the request was given up before, or cancelled."""
        flight = self._flights.pop(outcome.request_id, None)
        if flight is None:
            return
        self._count(flight, -flight.num_sequences)
        self._suspects.settled(flight.request_id)
        if flight.outlives_tick:
            self._wake()  # a load may have waited for this save
        # What was answered before the group died is done again, but not asked for again.
        self._books.watch.result(outcome, self._books.promises.is_pending(flight.request_id))
        self._when_sure(flight.request_id, lambda: self._take_note(flight, outcome), flight.on_lost)

    def _when_sure(
        self, request_id: str, take_note: Callable[[], object], on_lost: Callable[[], object]
    ) -> None:
        """An outcome that nobody has taken note of when the group is lost will come again."""
        era = self._era
        when_sure(self._keeper, request_id, lambda: take_note() if self._era == era else on_lost())

    def _take_note(self, flight: Flight, outcome: Outcome) -> None:
        try:
            if outcome.failure is not None:
                flight.on_failure(outcome.failure)
            else:
                outcome = replace(outcome, value=flight.on_value(outcome.value))
            self._tell(flight.proof, outcome)
        except Exception:
            logger.exception("could not take note of the outcome of request %s", flight.request_id)
            self._tell(flight.proof, Outcome(flight.request_id, failure=INTERNAL_ERROR))

    def settle_rest(self, assembly: Assembly) -> None:
        """The tick is over: what got no answer in it gets none."""
        for request_id, flight in assembly.flights.items():
            if not flight.outlives_tick:
                self.settle(Outcome(request_id, failure=_SILENT))

    def settle_verdicts(self, assembly: Assembly) -> None:
        verdicts, assembly.verdicts = assembly.verdicts, []
        for verdict in verdicts:
            proof = assembly.proofs.get(verdict.request_id, Proof.NOTHING)
            self._when_sure(verdict.request_id, partial(self._tell, proof, verdict), lambda: None)

    def heard(self, report: TickReport) -> None:
        """A sample that no rank decodes any more and that got no answer would keep us ticking for ever."""
        silent = report.active_samples == 0 and self.num_sequences > 0
        self._num_silent_reports = self._num_silent_reports + 1 if silent else 0
        if self._num_silent_reports == 2:
            for flight in [f for f in self._flights.values() if f.num_sequences]:
                self.settle(Outcome(flight.request_id, failure=_SILENT))

    def fail(self, window: Window, assembly: Assembly) -> None:
        """A bug, ours or the group's, met this tick: its requests fail, the others go on."""
        for request_id in assembly.flights:
            self.settle(Outcome(request_id, failure=INTERNAL_ERROR))
        for work in window.work:
            for entry in work.entries:
                self._when_sure(entry.request_id, partial(self._fail, entry), lambda: None)

    def _fail(self, entry: RunEntry) -> None:
        kept = None if self._keeper is None else self._keeper.find(entry.request_id)
        if kept is None or not kept.is_untold(entry.request_id):  # a load that is done stays done
            self._tell(proof_of(entry.command), Outcome(entry.request_id, failure=INTERNAL_ERROR))

    def lose(self, waiting: Iterable[Flight]) -> None:
        """The group is gone, and with it what was in flight and the samples that wait."""
        for flight in self._take_all(waiting):
            flight.on_lost()
            if flight.num_sequences:
                self._books.promises.lose(flight.request_id, self._books.clock.now())

    def abandon(self, waiting: Iterable[Flight], failure: Failure) -> None:
        """The same where nothing is done again."""
        for flight in self._take_all(waiting):
            flight.on_failure(failure)
            if flight.num_sequences:
                self._books.promises.lose(flight.request_id, self._books.clock.now())
            else:
                self._books.fail(flight.request_id, failure)

    def _take_all(self, waiting: Iterable[Flight]) -> list[Flight]:
        self._era += 1
        flights = [*self._flights.values(), *waiting]
        self._flights.clear()
        self.sequences.clear()
        return flights

    def _tell(self, proof: Proof, outcome: Outcome) -> None:
        tell(self._books, self._keeper, proof, outcome)
