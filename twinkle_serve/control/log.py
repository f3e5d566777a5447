"""One run's command log: numbered requests in, the same requests in order out.

Knows seq_ids, gaps and duplicates. Does not know what a command does, when it runs or how it is answered.

A client numbers the requests of a run 1, 2, 3, ... and may deliver them in another order: the first chunk
of a split batch arrives last. A request waits ("parked") until all smaller numbers are there. A number
that never comes would hold up its successors for ever, so after ``gap_timeout_s`` they fail, the log goes
on behind them, and the missing request fails too if it turns up after all: running it then would apply
it to a state that its sender never had in mind.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from twinkle_serve.protocol.work import Failure

C = TypeVar("C")


@dataclass(frozen=True, slots=True)
class Entry(Generic[C]):
    """A command and the promise that it will settle."""

    seq_id: int
    request_id: str
    command: C


class CommandLog(Generic[C]):
    """``ready`` holds the commands whose turn has come; whoever executes them takes from its left."""

    def __init__(self, gap_timeout_s: float, first_seq_id: int | None = 1) -> None:
        """first_seq_id: None if the log is that of a run whose past is unknown: it starts with whatever
        comes first."""
        self.ready: deque[Entry[C]] = deque()
        self._gap_timeout_s = gap_timeout_s
        self._resuming = first_seq_id is None
        self._next = first_seq_id or 1
        self._highest = self._next - 1
        self._parked: dict[int, Entry[C]] = {}
        self._request_ids: dict[int, str] = {}
        self._gap_since: float | None = None
        self._is_held = False

    def restarted(self, first_seq_id: int) -> CommandLog[C]:
        """An empty log that begins at ``first_seq_id`` and recognises the same duplicates."""
        log: CommandLog[C] = CommandLog(self._gap_timeout_s, first_seq_id)
        log._request_ids = self._request_ids
        return log

    def original(self, seq_id: int | None) -> str | None:
        """The request id that this seq_id was given when it first came, or None if it is new."""
        return None if seq_id is None else self._request_ids.get(seq_id)

    def append(self, seq_id: int | None, request_id: str, command: C, now: float) -> Failure | None:
        """Take in a request that ``original`` does not know. None for seq_id means after all others: it takes
        the next number, and whoever comes with that is too late.

        Returns why the request must fail at once, or None if it waits its turn.
        """
        if seq_id is None:
            seq_id = self._highest + 1
        else:
            if self._resuming:
                self._next, self._resuming = seq_id, False
            self._request_ids[seq_id] = request_id
        if seq_id < self._next:
            return Failure(f"seq_id {seq_id} comes too late: the run has already gone on past it")
        if seq_id in self._parked:
            return Failure(f"seq_id {seq_id} comes too late: a request without a seq_id took its place")
        self._highest = max(self._highest, seq_id)
        self._parked[seq_id] = Entry(seq_id, request_id, command)
        self._release(now)
        return None

    @property
    def next_number(self) -> int:
        """What ``append`` will take for the seq_id of a request that has none."""
        return self._highest + 1

    def prepend(self, request_id: str, command: C) -> None:
        """Make ``command`` the first of a log that is still empty; it has no seq_id of its own."""
        assert not self.ready
        assert not self._parked
        self.ready.append(Entry(self._next - 1, request_id, command))

    @property
    def deadline(self) -> float | None:
        """When ``expire`` will have something to say if the gap stays open; None without a gap."""
        return None if self._gap_since is None else self._gap_since + self._gap_timeout_s

    @property
    def missing(self) -> int | None:
        """The seq_id that parked requests wait for, or None if none waits."""
        return self._next if self._parked else None

    def expire(self, now: float) -> list[tuple[str, Failure]]:
        """Give up a gap that has been open for too long: who fails, in order of seq_id."""
        deadline = self.deadline
        return [] if deadline is None or now < deadline else self.give_up()

    def give_up(self) -> list[tuple[str, Failure]]:
        """Go on behind everything that is here, whatever is missing: who fails, in order of seq_id."""
        failed = [
            (entry.request_id, self._gap_failure(seq_id)) for seq_id, entry in sorted(self._parked.items())
        ]
        self._parked.clear()
        self._gap_since = None
        self._next = self._highest + 1
        return failed

    def forget(self, seq_id: int) -> None:
        """Stop recognising duplicates of a request whose result nobody can ask for any more."""
        self._request_ids.pop(seq_id, None)

    def remember(self, seq_id: int, request_id: str) -> None:
        """Recognise duplicates of a request that an earlier life of this log has dealt with."""
        self._request_ids[seq_id] = request_id

    def rewind(self, entries: Sequence[Entry[C]]) -> None:
        """These, which were taken from ``ready`` before, come once more, in front of all others."""
        self.ready.extendleft(reversed(entries))

    @property
    def parked(self) -> list[C]:
        """The commands that wait for a smaller seq_id."""
        return [entry.command for entry in self._parked.values()]

    @property
    def is_held(self) -> bool:
        return self._is_held

    def hold(self) -> list[Entry[C]]:
        """Let nothing become ready until ``go_on``; what was."""
        entries, self._is_held = list(self.ready), True
        self.ready.clear()
        return entries

    def go_on(self, now: float) -> None:
        self._is_held = False
        self._release(now)

    def _release(self, now: float) -> None:
        if self._is_held:
            return
        moved = False
        while (entry := self._parked.pop(self._next, None)) is not None:
            self.ready.append(entry)
            self._next += 1
            moved = True
        if not self._parked:
            self._gap_since = None
        elif moved or self._gap_since is None:
            self._gap_since = now

    def _gap_failure(self, seq_id: int) -> Failure:
        return Failure(
            f"seq_id {self._next} did not arrive within {self._gap_timeout_s:g} s, "
            f"so the request with seq_id {seq_id} was not run"
        )
