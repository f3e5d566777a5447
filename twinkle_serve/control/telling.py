"""What has to be on disk before a client is told what became of its request.

A run that is lost is done again from its journal, and what its client was told must stay true. Most commands
do the same again. Others do not: a checkpoint to load may be replaced or deleted meanwhile, one that was
saved and then deleted would come back, and what failed for want of memory or of a checkpoint may succeed. So

* a failure is told once the journal has a note of it, and what is noted is not done again. Nor does anything
  count before that which came after it in its run, and did not find its work; and
* the outcome of a save is noted in the same way; but
* a load is told once a snapshot has what it did, and its run does nothing more until then. From there on
  nobody goes back: no older snapshot is kept. Only an unload need not wait: nothing is left to be done again.

Doing again what nobody was told of is as good as doing it later. Optimizer steps need no note: one that is
refused discards the gradients, and does so again. Knows commands and outcomes. Does not know ticks.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from twinkle_serve.control.backend import (
    LoadCommand,
    PassCommand,
    SaveCommand,
    SnapshotCommand,
    UnloadCommand,
)
from twinkle_serve.control.books import Books
from twinkle_serve.control.codec import decode_result, encode_result
from twinkle_serve.control.commands import BirthCommand, RunCommand
from twinkle_serve.control.flights import Proof
from twinkle_serve.control.keeper import Keeper
from twinkle_serve.control.kept import Noted, Untold
from twinkle_serve.protocol.work import Failure, Outcome
from twinkle_serve.storage.journal_rows import VOID, JournalEntry

GIVEN_UP = Failure("the workers died each time they tried this request, so it was given up", "server")


def proof_of(command: RunCommand) -> Proof:
    """What the answer to a command waits for."""
    match command:
        case SaveCommand():
            return Proof.OUTCOME
        case LoadCommand() | BirthCommand(path=str()):
            return Proof.SNAPSHOT
        case PassCommand() | SnapshotCommand() | BirthCommand() | UnloadCommand():
            return Proof.FAILURE
    return Proof.NOTHING


def when_sure(keeper: Keeper | None, request_id: str, take_note: Callable[[], object]) -> None:
    """Take note of an outcome, once all failures before it in its run are on disk."""
    kept = None if keeper is None else keeper.find(request_id)
    if kept is None or kept.noting is None:
        take_note()
    else:
        kept.noting.add_done_callback(
            lambda noting: None if _has_failed(noting) else when_sure(keeper, request_id, take_note)
        )


def tell(books: Books, keeper: Keeper | None, proof: Proof, outcome: Outcome) -> None:
    """Settle a request's promise, now or when ``proof`` is on disk."""
    request_id = outcome.request_id
    at_once = proof is Proof.NOTHING or (proof is Proof.FAILURE and outcome.failure is None)
    if keeper is None or at_once or not books.promises.is_pending(request_id):
        _settle(books, outcome)
    elif proof is Proof.SNAPSHOT and outcome.failure is None:
        kept = keeper.kept_of(request_id)
        kept.untold = Untold(kept.seq_id_of(request_id), request_id, outcome.value)
    else:
        note(keeper, outcome)


def note(keeper: Keeper, outcome: Outcome) -> None:
    """Write down the outcome of a pending request, then tell it. The first one stands."""
    request_id, books = outcome.request_id, keeper.books
    kept = keeper.kept_of(request_id)
    if request_id in kept.noted:
        return
    seq_id = kept.seq_id_of(request_id)
    kept.noted[request_id] = Noted(seq_id, outcome.value, outcome.failure)
    payload = encode_result(outcome.value, outcome.failure)
    now = books.clock.now()
    entry = JournalEntry(kept.run.run_id, seq_id, request_id, payload, now, kind=VOID)

    def written(future: asyncio.Future[None]) -> None:
        if not _has_failed(future):
            if kept.noting is future:
                kept.noting = None
                keeper.wake(kept)
            _settle(books, outcome)

    future = keeper.journal.append(entry)
    future.add_done_callback(written)
    if outcome.failure is not None:
        kept.noting = future


def read_note(entry: JournalEntry) -> Noted:
    """What ``note`` wrote down. Older servers wrote nothing else than that a request was given up."""
    if not entry.payload:
        return Noted(entry.seq_id, failure=GIVEN_UP)
    return Noted(entry.seq_id, *decode_result(entry.payload))


def _has_failed(future: asyncio.Future[None]) -> bool:
    return future.cancelled() or future.exception() is not None


def _settle(books: Books, outcome: Outcome) -> None:
    if outcome.failure is not None:
        books.fail(outcome.request_id, outcome.failure)
    else:
        books.resolve(outcome.request_id, outcome.value, outcome.num_bytes)
