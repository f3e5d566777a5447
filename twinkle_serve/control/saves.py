"""Saves and snapshots: what a run leaves outside of its slot, under a name or as a sampling session.

Knows checkpoints, samplers and what was done already before a group was lost. Does not know slots or ticks.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from twinkle_serve.control.backend import SaveCommand, SnapshotCommand
from twinkle_serve.control.books import Books
from twinkle_serve.control.checkpoints import check_ttl, key_of, path_of
from twinkle_serve.control.commands import RunEntry
from twinkle_serve.control.flights import Assembly, Flight
from twinkle_serve.control.keeper import Keeper
from twinkle_serve.control.runs import Run
from twinkle_serve.control.samplers import sampler_id_for
from twinkle_serve.control.telling import proof_of
from twinkle_serve.protocol.errors import UserError
from twinkle_serve.protocol.work import Failure, SaveAdapter, Snapshot
from twinkle_serve.storage.records import CheckpointRecord, SamplerRecord

Place = Callable[[int], object]
"""Adds a command's work to the tick, once the run's slot is known."""


class Done(Exception):
    """A command that a recovered run needs no more, because its work outlived the group; its answer."""

    def __init__(self, value: Any) -> None:
        self.value = value


class Refused(Exception):
    """A command that is not run, and the failure that its client gets."""

    def __init__(self, failure: Failure) -> None:
        self.failure = failure


def save_order(
    books: Books,
    keeper: Keeper | None,
    assembly: Assembly,
    run: Run,
    entry: RunEntry,
    command: SaveCommand,
) -> Place:
    """Write a checkpoint, unless it is there from before the group was lost."""
    check_ttl(command.ttl_seconds)
    name = f"checkpoint-{entry.seq_id:06d}" if command.name is None else command.name
    checkpoints = books.checkpoints
    earlier = checkpoints.at((run.run_id, command.kind, name))
    if earlier is not None and earlier.seq_id is not None and earlier.seq_id >= entry.seq_id:
        # Done before all was lost and its outcome noted, and maybe replaced by a later request of the run.
        raise Done({"path": path_of(key_of(earlier)), "size_bytes": earlier.size_bytes})
    no_room = None if keeper is None else keeper.no_room_for_a_save()
    if no_room is not None:
        raise Refused(no_room)
    directory = checkpoints.reserve(run.run_id, command.kind, name, command.overwrite)
    now = books.clock.now()
    record = CheckpointRecord(
        run.run_id,
        command.kind,
        name,
        run.tenant,
        run.record.base_model,
        run.record.spec,
        directory,
        0,
        now,
        None if command.ttl_seconds is None else now + command.ttl_seconds,
        user_metadata=dict(command.user_metadata),
        has_optimizer=command.kind == "weights",
        seq_id=entry.seq_id,
    )

    def saved(size_bytes: int) -> Any:
        checkpoints.commit(record, size_bytes)
        return {"path": path_of(key_of(record)), "size_bytes": size_bytes}

    def over(_: Failure | None = None) -> None:
        checkpoints.discard(key_of(record), directory)

    assembly.flights[entry.request_id] = Flight(
        entry.request_id, saved, over, over, proof_of(command), outlives_tick=True
    )
    manifest = _manifest(record) | _form(command, name)
    return lambda slot: assembly.saves.append(
        SaveAdapter(entry.request_id, slot, directory, record.has_optimizer, manifest)
    )


def snapshot_order(
    books: Books,
    keeper: Keeper | None,
    assembly: Assembly,
    run: Run,
    entry: RunEntry,
    command: SnapshotCommand,
) -> Place:
    """Freeze the weights for sampling, as a new sampling session or as the one that a recovered run had."""
    samplers, request_id = books.samplers, entry.request_id
    number = command.sampling_session_seq_id
    sampler_id = sampler_id_for(run.record.session_id, number)
    earlier = samplers.find(sampler_id)
    is_again = (
        earlier is not None and earlier.record.run_id == run.run_id and earlier.record.seq_id == entry.seq_id
    )
    if earlier is not None and is_again and not earlier.awaited:
        raise Done({"sampling_session_id": sampler_id})
    if earlier is not None and not is_again:
        raise UserError(f"sampling_session_seq_id {number} is already in use in this session")

    def frozen(_: Any) -> Any:
        if is_again:
            samplers.frozen_again(sampler_id)
            return {"sampling_session_id": sampler_id}
        now = books.clock.now()
        samplers.create(
            SamplerRecord(
                sampler_id,
                run.record.session_id,
                run.tenant,
                run.record.base_model,
                now,
                run_id=run.run_id,
                snapshot=sampler_id,
                seq_id=entry.seq_id,
                inflight=command.inflight,
            ),
            run.group,
        )
        samplers.retire(run.run_id)
        return {"sampling_session_id": sampler_id}

    assembly.flights[request_id] = Flight(request_id, frozen, proof=proof_of(command))
    path = None if keeper is None else keeper.files.path(keeper.sampler_file(sampler_id))
    return lambda slot: assembly.snapshots.append(Snapshot(request_id, slot, sampler_id, path))


def _form(command: SaveCommand, name: str) -> dict[str, Any]:
    """How an export is written. The cookbook's tools, which ask for encryption, want the hosted service's
    layout; `tinker checkpoint download`, which does not, is to get what PEFT loads."""
    if command.kind != "external_weights":
        return {}
    hosted = bool(command.age_recipients) or name.endswith(".tinker")
    return {"layout": "tinker" if hosted else "peft", "age_recipients": list(command.age_recipients)}


def _manifest(record: CheckpointRecord) -> dict[str, Any]:
    return {
        "run_id": record.run_id,
        "kind": record.kind,
        "name": record.name,
        "base_model": record.base_model,
        "rank": record.spec.rank,
        "train_attn": record.spec.train_attn,
        "train_mlp": record.spec.train_mlp,
        "train_unembed": record.spec.train_unembed,
        "created_at": record.created_at,
        "user_metadata": dict(record.user_metadata),
    }
