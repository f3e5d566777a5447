"""Training runs: who owns them, their logs, and whether there is an adapter behind them.

Knows tenants and records. Does not know slots, promises or ticks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from twinkle_serve.control.backend import NotFound
from twinkle_serve.control.commands import RunCommand
from twinkle_serve.control.log import CommandLog
from twinkle_serve.protocol.work import Failure
from twinkle_serve.storage.records import RunRecord

_UNBORN = Failure("the run's adapter is not made yet", "server")
# Persisting every request's time would put the disk on the path of each; a listing can be a minute off.
_SAVE_EVERY_S = 60.0


@dataclass(slots=True)
class Run:
    """down: why there is no adapter to work on (yet unborn runs included), or None. home: the group that it
    was given to; None: there is only one."""

    record: RunRecord
    log: CommandLog[RunCommand]
    down: Failure | None = None
    saved_at: float = 0.0
    home: str | None = None

    @property
    def run_id(self) -> str:
        return self.record.run_id

    @property
    def tenant(self) -> str:
        return self.record.tenant

    @property
    def group(self) -> str:
        return self.home or self.record.base_model

    def await_adapter(self) -> None:
        """What it had is gone, and its birth is to be done again."""
        self.down = _UNBORN

    @property
    def wants_adapter(self) -> bool:
        """It has one, or waits for its first."""
        return self.down in (None, _UNBORN) and not self.record.unloaded


def run_id_for(session_id: str, model_seq_id: int) -> str:
    """Part of the protocol: the SDK computes it by itself."""
    return f"{session_id}:train:{model_seq_id}"


class Runs:
    """All runs of all tenants. ``save`` is called with each record that changed. gap_timeout_s: by base
    model, how long a run waits for a seq_id that does not come."""

    def __init__(self, gap_timeout_s: Callable[[str], float], save: Callable[[RunRecord], object]) -> None:
        self._gap_timeout_s = gap_timeout_s
        self._save = save
        self._runs: dict[str, Run] = {}
        self._by_tenant: dict[str, list[str]] = {}

    def create(self, record: RunRecord) -> Run:
        assert record.run_id not in self._runs
        self._save(record)  # first: what cannot be saved does not exist, and may be asked for again
        return self._add(record, _UNBORN, 1)

    def restore(self, record: RunRecord) -> Run:
        """A run of an earlier life of this server: listed, but its adapter is gone."""
        message = (
            f"run {record.run_id} lost its adapter when the server restarted; load one of its checkpoints"
        )
        return self._add(record, Failure(message, "server"), None)

    def get(self, tenant: str, run_id: str) -> Run:
        run = self._runs.get(run_id)
        if run is None or run.tenant != tenant:
            raise NotFound(f"training run {run_id!r} does not exist")
        return run

    def find(self, run_id: str) -> Run | None:
        """Whoever owns it."""
        return self._runs.get(run_id)

    def usable(self, tenant: str, run_id: str, now: float) -> Run:
        """The run, if it takes commands; asking counts as its latest request."""
        run = self.get(tenant, run_id)
        if run.record.unloaded:
            raise NotFound(f"training run {run_id!r} was unloaded; only its checkpoints remain")
        run.record = replace(run.record, last_request_at=now)
        if now - run.saved_at >= _SAVE_EVERY_S:
            self.save(run)
        return run

    def unload(self, run: Run) -> None:
        """The run is as it was if this raises."""
        record = replace(run.record, unloaded=True)
        self._save(record)
        run.record, run.down = record, Failure(f"training run {run.run_id} was unloaded")

    def of_model(self, base_model: str) -> list[Run]:
        """Of all tenants, the oldest first."""
        return [run for run in self._runs.values() if run.record.base_model == base_model]

    def of_group(self, group: str) -> list[Run]:
        """Of all tenants, the oldest first."""
        return [run for run in self._runs.values() if run.group == group]

    def oldest_first(self, tenant: str) -> Iterator[Run]:
        return (self._runs[run_id] for run_id in self._by_tenant.get(tenant, ()))

    def of_tenant(self, tenant: str) -> list[Run]:
        """Newest first."""
        return [self._runs[run_id] for run_id in reversed(self._by_tenant.get(tenant, []))]

    def _add(self, record: RunRecord, down: Failure, first_seq_id: int | None) -> Run:
        assert record.run_id not in self._runs
        log: CommandLog[RunCommand] = CommandLog(self._gap_timeout_s(record.base_model), first_seq_id)
        run = Run(record, log, down, record.last_request_at)
        self._runs[record.run_id] = run
        self._by_tenant.setdefault(record.tenant, []).append(record.run_id)
        return run

    def save(self, run: Run) -> None:
        """Its record has changed."""
        run.saved_at = run.record.last_request_at
        self._save(run.record)
