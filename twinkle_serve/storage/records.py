"""What survives a restart: one frozen record per session, run, sampler and checkpoint.

Knows only plain values. Does not know how they are stored (catalog.py) nor what the control plane does
with them. All times are POSIX seconds (UTC).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from twinkle_serve.protocol.data import LoraSpec


@dataclass(frozen=True, slots=True)
class SessionRecord:
    """A client's session. ``info`` is what it sent at creation (tags, user_metadata, display_name, ...).

    status: "active", "finished" (``finish_reason`` says how) or "expired" (no heartbeat for too long).
    silent_since: when an expired one was last heard of.
    """

    session_id: str
    tenant: str
    created_at: float
    info: Mapping[str, Any] = field(default_factory=dict)
    status: str = "active"
    finish_reason: Mapping[str, Any] | None = None
    silent_since: float | None = None


@dataclass(frozen=True, slots=True)
class RunRecord:
    """A training run. run_id is ``{session_id}:train:{model_seq_id}``.

    unloaded: its adapter was dropped for good; only its checkpoints remain. corrupted: it could not be
    recovered after a crash, for damage that must not be guessed away.
    """

    run_id: str
    session_id: str
    model_seq_id: int
    tenant: str
    base_model: str
    spec: LoraSpec
    created_at: float
    last_request_at: float
    user_metadata: Mapping[str, str] = field(default_factory=dict)
    unloaded: bool = False
    corrupted: bool = False


@dataclass(frozen=True, slots=True)
class SamplerRecord:
    """A sampling session. Exactly one of three sources: the base model alone (both None), a checkpoint
    (``model_path``), or a snapshot of ``run_id`` (``snapshot``) made by its request ``seq_id``. inflight: it
    moves on to each newer snapshot of this kind."""

    sampler_id: str
    session_id: str
    tenant: str
    base_model: str
    created_at: float
    model_path: str | None = None
    run_id: str | None = None
    snapshot: str | None = None
    seq_id: int | None = None
    inflight: bool = False


@dataclass(frozen=True, slots=True)
class LossRecord:
    """A loss that a client uploaded. loss_id: ``{session_id}:loss:{custom_loss_seq_id}``. graph: what
    protocol.loss_graph.read_graph takes. request_id: of the promise that answers with the loss_id."""

    loss_id: str
    session_id: str
    tenant: str
    created_at: float
    request_id: str
    graph: str


@dataclass(frozen=True, slots=True)
class CheckpointRecord:
    """A whole checkpoint on disk. kind: "weights", "sampler_weights" or "external_weights".

    directory: what catalog.directory_for gave; expires_at None: kept until deleted; seq_id: of the run's
    request that saved it.
    """

    run_id: str
    kind: str
    name: str
    tenant: str
    base_model: str
    spec: LoraSpec
    directory: str
    size_bytes: int
    created_at: float
    expires_at: float | None = None
    public: bool = False
    user_metadata: Mapping[str, str] = field(default_factory=dict)
    has_optimizer: bool = False
    seq_id: int | None = None
