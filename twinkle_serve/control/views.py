"""Runs and checkpoints as the wire shows them.

Knows the field names of the SDK's models. Does not know where records come from.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from twinkle_serve.protocol.data import LoraSpec
from twinkle_serve.protocol.paths import CheckpointPath
from twinkle_serve.storage.records import CheckpointRecord, RunRecord

_TYPES = {"weights": "training", "sampler_weights": "sampler", "external_weights": "external"}


def timestamp(seconds: float) -> str:
    """RFC 3339 with a time zone: the SDK's command line compares it with aware datetimes."""
    return datetime.fromtimestamp(seconds, UTC).isoformat().replace("+00:00", "Z")


def text_values(metadata: Mapping[str, Any]) -> dict[str, str]:
    """Clients may send any JSON as user_metadata, but are only ever shown strings."""
    return {key: value if isinstance(value, str) else json.dumps(value) for key, value in metadata.items()}


def checkpoint_view(record: CheckpointRecord) -> dict[str, Any]:
    path = CheckpointPath(record.run_id, record.kind, record.name)
    view: dict[str, Any] = {
        "checkpoint_id": path.checkpoint_id,
        "checkpoint_type": _TYPES[record.kind],
        "time": timestamp(record.created_at),
        "tinker_path": str(path),
        "size_bytes": record.size_bytes,
        "public": record.public,
        "user_metadata": text_values(record.user_metadata),
    }
    if record.expires_at is not None:
        view["expires_at"] = timestamp(record.expires_at)
    return view


def run_view(record: RunRecord, checkpoints: Sequence[CheckpointRecord]) -> dict[str, Any]:
    """``checkpoints``: the run's own, newest first."""
    view: dict[str, Any] = {
        "training_run_id": record.run_id,
        "base_model": record.base_model,
        "model_owner": record.tenant,
        "is_lora": True,
        "lora_rank": record.spec.rank,
        "corrupted": record.corrupted,
        "last_request_time": timestamp(record.last_request_at),
        "user_metadata": text_values(record.user_metadata),
    }
    for field, kind in (("last_checkpoint", "weights"), ("last_sampler_checkpoint", "sampler_weights")):
        newest = next((c for c in checkpoints if c.kind == kind), None)
        if newest is not None:
            view[field] = checkpoint_view(newest)
    return view


def weights_view(base_model: str, spec: LoraSpec) -> dict[str, Any]:
    return {
        "base_model": base_model,
        "is_lora": True,
        "lora_rank": spec.rank,
        "train_attn": spec.train_attn,
        "train_mlp": spec.train_mlp,
        "train_unembed": spec.train_unembed,
    }
