from __future__ import annotations

from datetime import datetime

import pytest

from twinkle_serve.control.views import checkpoint_view, run_view, text_values, timestamp, weights_view
from twinkle_serve.protocol.data import LoraSpec
from twinkle_serve.storage.records import CheckpointRecord, RunRecord

RUN = RunRecord("s:train:0", "s", 0, "alice", "base", LoraSpec(8), 0.0, 1_700_000_000.5, {"n": "1"})


def checkpoint(kind: str, **fields) -> CheckpointRecord:
    return CheckpointRecord("s:train:0", kind, "ck", "alice", "base", LoraSpec(8), "/x", 9, 0.0, **fields)


def test_times_have_a_zone():
    assert timestamp(1_700_000_000.5) == "2023-11-14T22:13:20.500000Z"
    assert datetime.fromisoformat(timestamp(0.0)).tzinfo is not None


def test_metadata_is_shown_as_text():
    assert text_values({"a": "x", "b": 1, "c": [1, None]}) == {"a": "x", "b": "1", "c": "[1, null]"}


@pytest.mark.parametrize(
    ("kind", "shown"),
    [("weights", "training"), ("sampler_weights", "sampler"), ("external_weights", "external")],
)
def test_a_checkpoint(kind, shown):
    view = checkpoint_view(checkpoint(kind, user_metadata={"a": "b"}, public=True))
    assert view == {
        "checkpoint_id": f"{kind}/ck",
        "checkpoint_type": shown,
        "time": "1970-01-01T00:00:00Z",
        "tinker_path": f"tinker://s:train:0/{kind}/ck",
        "size_bytes": 9,
        "public": True,
        "user_metadata": {"a": "b"},
    }
    assert checkpoint_view(checkpoint(kind, expires_at=1.0))["expires_at"] == "1970-01-01T00:00:01Z"


def test_a_run():
    view = run_view(RUN, [])
    assert view == {
        "training_run_id": "s:train:0",
        "base_model": "base",
        "model_owner": "alice",
        "is_lora": True,
        "lora_rank": 8,
        "corrupted": False,
        "last_request_time": "2023-11-14T22:13:20.500000Z",
        "user_metadata": {"n": "1"},
    }
    both = run_view(
        RUN, [checkpoint("external_weights"), checkpoint("weights"), checkpoint("sampler_weights")]
    )
    assert both["last_checkpoint"]["checkpoint_type"] == "training"
    assert both["last_sampler_checkpoint"]["checkpoint_type"] == "sampler"


def test_weights():
    assert weights_view("base", LoraSpec(4, train_mlp=False)) == {
        "base_model": "base",
        "is_lora": True,
        "lora_rank": 4,
        "train_attn": True,
        "train_mlp": False,
        "train_unembed": True,
    }


def test_the_sdk_accepts_these():
    types = pytest.importorskip("tinker.types")
    types.TrainingRun.model_validate(run_view(RUN, [checkpoint("weights"), checkpoint("sampler_weights")]))
    types.Checkpoint.model_validate(checkpoint_view(checkpoint("external_weights", expires_at=1.0)))
