"""Sampling sessions: what each samples from, its requests so far, and which snapshots are kept.

Knows tenants and counts requests in flight. Does not know how a sample is drawn or where weights lie.

Clients never release a sampler, and reinforcement learning makes one a step. So of a run's snapshots the
newest few are kept, and older ones only while requests on them are in flight. Samplers of the kind inflight
all draw from the newest snapshot of that kind: a request that began before it was made ends with the weights
it began with, which are no older than its own sampler's.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field

from twinkle_serve.control.backend import NotFound
from twinkle_serve.protocol.errors import BackendUnavailable
from twinkle_serve.storage.records import SamplerRecord


@dataclass(slots=True)
class Sampler:
    """requests: seq_id to (request id, number of sequences) of what came already. evicted: its snapshot is
    gone. path: the file that has it since the group lost it. awaited: neither has it until its run has come
    so far again. home: the group that made the snapshot."""

    record: SamplerRecord
    requests: dict[int, tuple[str, int]] = field(default_factory=dict)
    num_in_flight: int = 0
    evicted: bool = False
    path: str | None = None
    awaited: bool = False
    home: str | None = None

    @property
    def group(self) -> str:
        return self.home or self.record.base_model


def sampler_id_for(session_id: str, sampling_session_seq_id: int) -> str:
    return f"{session_id}:sample:{sampling_session_seq_id}"


class Samplers:
    """All samplers of all tenants. ``save`` is called with each new record."""

    def __init__(self, snapshots_per_run: int, save: Callable[[SamplerRecord], object]) -> None:
        self._snapshots_per_run = snapshots_per_run
        self._save = save
        self._samplers: dict[str, Sampler] = {}
        self._by_session: dict[str, list[str]] = defaultdict(list)
        self._snapshots: dict[str, list[str]] = defaultdict(list)  # by run, the oldest first
        self._retired: set[str] = set()  # to be evicted once nothing is in flight
        self._newest: dict[str, Sampler] = {}  # of the kind inflight, by run

    def create(self, record: SamplerRecord, home: str | None = None) -> None:
        self._save(record)
        self._add(Sampler(record, home=home))
        if record.run_id is not None:
            self._snapshots[record.run_id].append(record.sampler_id)

    def restore(self, record: SamplerRecord) -> None:
        """A sampler of an earlier life of this server; ``relocate`` may find its snapshot again."""
        self._add(Sampler(record, evicted=record.snapshot is not None))

    def with_snapshot(self) -> list[Sampler]:
        return [sampler for sampler in self._samplers.values() if sampler.record.snapshot is not None]

    def runs_with_snapshots(self) -> list[str]:
        return [run_id for run_id, snapshots in self._snapshots.items() if snapshots]

    def find(self, sampler_id: str) -> Sampler | None:
        return self._samplers.get(sampler_id)

    def relocate(self, sampler: Sampler, path: str | None, awaited: bool) -> None:
        """The group lost the snapshot: it is in a file, or comes back as its run is replayed, or is gone."""
        snapshots = self._snapshots[sampler.record.run_id or ""]
        sampler.path, sampler.awaited = path, awaited and path is None
        sampler.evicted = path is None and not awaited
        sampler_id = sampler.record.sampler_id
        if sampler.evicted:
            self._retired.discard(sampler_id)
            if sampler_id in snapshots:
                snapshots.remove(sampler_id)
        elif sampler_id not in snapshots:
            snapshots.append(sampler_id)

    def frozen_again(self, sampler_id: str) -> None:
        self._samplers[sampler_id].awaited = False

    def exists(self, sampler_id: str) -> bool:
        return sampler_id in self._samplers

    def get(self, tenant: str, sampler_id: str) -> Sampler:
        sampler = self._samplers.get(sampler_id)
        if sampler is None or sampler.record.tenant != tenant:
            raise NotFound(f"sampling session {sampler_id!r} does not exist")
        return sampler

    def usable(self, tenant: str, sampler_id: str) -> Sampler:
        sampler = self.get(tenant, sampler_id)
        source = self.source(sampler)
        if source.evicted or source.record.sampler_id in self._retired:
            raise NotFound(
                f"sampling session {sampler_id!r} is gone: only the newest {self._snapshots_per_run} "
                "unnamed snapshots of a run are kept; save the weights under a name to keep them"
            )
        if source.awaited:
            raise BackendUnavailable("the service is recovering from a failure; try again")
        return sampler

    def source(self, sampler: Sampler) -> Sampler:
        """The one whose weights a request draws from that comes now."""
        return self._newest[sampler.record.run_id or ""] if sampler.record.inflight else sampler

    def of_session(self, session_id: str) -> list[str]:
        return list(self._by_session.get(session_id, []))

    def started(self, sampler_id: str) -> None:
        self._samplers[sampler_id].num_in_flight += 1

    def ended(self, sampler_id: str) -> None:
        self._samplers[sampler_id].num_in_flight -= 1

    def forget(self, sampler_id: str, seq_id: int) -> None:
        """Stop recognising duplicates of a request whose result nobody can ask for any more."""
        self._samplers[sampler_id].requests.pop(seq_id, None)

    def retire(self, run_id: str, keep: int | None = None) -> None:
        """Leave only the newest snapshots of a run (``keep``; None: the configured number)."""
        keep = self._snapshots_per_run if keep is None else keep
        snapshots = self._snapshots.get(run_id, [])
        inflight = [sampler_id for sampler_id in snapshots if self._samplers[sampler_id].record.inflight]
        others = [sampler_id for sampler_id in snapshots if sampler_id not in inflight]
        self._retired.update(others[: max(0, len(others) - keep)])
        self._retired.update(inflight[: max(0, len(inflight) - min(keep, 1))])

    def evict(self, group: str) -> list[str]:
        """The snapshots that a group may drop now: retired ones that nobody samples from."""
        retired = (self._samplers[sampler_id] for sampler_id in sorted(self._retired))
        idle = [
            sampler.record.sampler_id
            for sampler in retired
            if sampler.num_in_flight == 0 and sampler.group == group
        ]
        dropped = []
        for sampler_id in idle:
            self._retired.remove(sampler_id)
            sampler = self._samplers[sampler_id]
            sampler.evicted = True
            assert sampler.record.run_id is not None
            assert sampler.record.snapshot is not None
            self._snapshots[sampler.record.run_id].remove(sampler_id)
            dropped.append(sampler.record.snapshot)
        return dropped

    def lose_snapshots(self, group: str) -> None:
        """The group is gone with all snapshots in it."""
        for run_id, snapshots in list(self._snapshots.items()):
            if snapshots and self._samplers[snapshots[0]].group == group:
                for sampler_id in self._snapshots.pop(run_id):
                    self._samplers[sampler_id].evicted = True
                    self._retired.discard(sampler_id)

    def _add(self, sampler: Sampler) -> None:
        self._samplers[sampler.record.sampler_id] = sampler
        self._by_session[sampler.record.session_id].append(sampler.record.sampler_id)
        record = sampler.record
        if record.inflight and record.run_id is not None:
            newest = self._newest.get(record.run_id)
            if newest is None or (newest.record.seq_id or 0) < (record.seq_id or 0):
                self._newest[record.run_id] = sampler
