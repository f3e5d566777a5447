"""Which requests were at work whenever the group died: one that kills it each time must not be done for ever.

Requests that saw two deaths are tried again one run at a time, so that company is not blamed; whoever then is
there at a third is given up. Knows request ids, runs and counts. Does not know how anything is redone.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

_LONELY_AFTER = 2
_GUILTY_AFTER = 3


class Suspects:
    def __init__(self) -> None:
        self._deaths: Counter[str] = Counter()
        self._runs: dict[str, str] = {}
        self._alone: str | None = None

    def died(self, in_flight: Sequence[tuple[str, str]]) -> str | None:
        """The group died over these (request id, run id), in order. Returns the request to give up."""
        alone, guilty = self._alone, None
        for request_id, run_id in in_flight:
            self._deaths[request_id] += 1
            self._runs[request_id] = run_id
            if guilty is None and run_id == alone and self._deaths[request_id] >= _GUILTY_AFTER:
                guilty = request_id
        if guilty is not None:
            self.settled(guilty)
        else:
            self._choose()
        return guilty

    def settled(self, request_id: str) -> None:
        """It got through, or was given up."""
        if self._deaths.pop(request_id, 0):
            run_id = self._runs.pop(request_id)
            if run_id == self._alone and run_id not in self._runs.values():
                self._alone = None
                self._choose()

    @property
    def is_trying(self) -> bool:
        return self._alone is not None

    def forgive(self) -> None:
        """Whoever is being tried alone has nothing to do any more (a snapshot has it): the trial is over."""
        for request_id in [r for r, run_id in self._runs.items() if run_id == self._alone]:
            del self._deaths[request_id], self._runs[request_id]
        self._alone = None
        self._choose()

    def must_wait(self, run_id: str) -> bool:
        """Whether another run is being tried alone."""
        return self._alone is not None and run_id != self._alone

    def _choose(self) -> None:
        if self._alone is None:
            lonely = (r for r, n in self._deaths.items() if n >= _LONELY_AFTER)
            request_id = next(lonely, None)
            self._alone = None if request_id is None else self._runs[request_id]
