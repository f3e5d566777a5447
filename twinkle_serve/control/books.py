"""Everything the control plane remembers, in one place: promises and the four registries.

Knows how they are made from a catalogue at start-up. Does not know groups or ticks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from twinkle_serve.config import LimitsConfig
from twinkle_serve.control.checkpoints import Checkpoints
from twinkle_serve.control.clock import Clock
from twinkle_serve.control.custom_losses import CustomLosses
from twinkle_serve.control.metrics import Meter
from twinkle_serve.control.promises import PromiseTable, random_token
from twinkle_serve.control.quotas import Quotas, own_name
from twinkle_serve.control.runs import Runs
from twinkle_serve.control.samplers import Samplers
from twinkle_serve.control.sessions import Sessions
from twinkle_serve.control.usage import Usage
from twinkle_serve.control.watch import Watch
from twinkle_serve.protocol.work import Failure

if TYPE_CHECKING:
    from twinkle_serve.storage.catalog import Catalog
    from twinkle_serve.storage.ledger import Ledger


@dataclass(frozen=True, slots=True)
class Books:
    clock: Clock
    promises: PromiseTable
    sessions: Sessions
    runs: Runs
    samplers: Samplers
    checkpoints: Checkpoints
    losses: CustomLosses
    watch: Watch
    quotas: Quotas
    usage: Usage

    def fail(self, request_id: str, failure: Failure) -> None:
        self.promises.fail(request_id, failure, self.clock.now())
        self.watch.settled(request_id, failure)

    def resolve(self, request_id: str, value: object, num_bytes: int = 0) -> None:
        self.promises.resolve(request_id, value, self.clock.now(), num_bytes)
        self.watch.settled(request_id, None)

    def sweeps(self) -> tuple[Callable[[], object], ...]:
        """Steps that forget or write down what is due; each can be taken whatever becomes of the others."""
        return (
            self._forget_results,
            lambda: self.checkpoints.expire(self.clock.now()),
            self.usage.sweep,
            lambda: self.watch.forget_stale(self.promises.is_pending),
        )

    def _forget_results(self) -> None:
        for origin in self.promises.sweep(self.clock.now()):
            match origin:
                case ("run", str(run_id), int(seq_id)) if run := self.runs.find(run_id):
                    run.log.forget(seq_id)
                case ("sampler", str(sampler_id), int(seq_id)):
                    self.samplers.forget(sampler_id, seq_id)


def open_books(
    catalog: Catalog,
    clock: Clock,
    limits: LimitsConfig,
    gap_timeout_s: Callable[[str], float],
    new_token: Callable[[], str] = random_token,
    meter: Meter | None = None,
    name_of: Callable[[str], str] = own_name,
    ledger: Ledger | None = None,
) -> Books:
    """Books with everything in them that the catalogue remembers."""
    promises = PromiseTable(limits.result_retention_s, new_token, limits.results_max_bytes)
    sessions = Sessions(limits.session_expiry_s, catalog.put_session, new_token)
    runs = Runs(gap_timeout_s, catalog.put_run)
    samplers = Samplers(limits.sampler_snapshots_per_run, catalog.put_sampler)
    checkpoints = Checkpoints(catalog)
    quotas = Quotas(limits, clock, promises, sessions, runs, checkpoints, name_of)
    losses = CustomLosses(catalog.put_loss, catalog.delete_loss)
    usage = Usage(ledger, clock, sessions, checkpoints)
    checkpoints.noted = usage.checkpoint
    watch = Watch(clock, meter)

    def used(tenant: str, session_id: str, base_model: str, kind: str, amount: int) -> None:
        usage.tokens(tenant, session_id, base_model, kind, amount)
        if kind == "sampled":
            quotas.spend(tenant, amount)  # of the rest it was known before

    watch.used = used
    books = Books(clock, promises, sessions, runs, samplers, checkpoints, losses, watch, quotas, usage)
    contents = catalog.load_all()
    for session in contents.sessions:
        books.sessions.restore(session, clock.now())
    for run in contents.runs:
        books.runs.restore(run)
        owner = books.sessions.get(run.tenant, run.session_id)
        owner.models[run.model_seq_id] = (run.run_id, None)
    for sampler in contents.samplers:
        books.samplers.restore(sampler)
        owner = books.sessions.get(sampler.tenant, sampler.session_id)
        owner.samplers[int(sampler.sampler_id.rpartition(":")[2])] = sampler.sampler_id
    for loss in contents.losses:
        books.losses.restore(loss)
        books.promises.reopen(loss.request_id, loss.tenant, None)
        books.promises.resolve(loss.request_id, {"loss_id": loss.loss_id}, clock.now())
    for checkpoint in contents.checkpoints:
        books.checkpoints.restore(checkpoint)
    return books
