"""A run as a checkpoint directory: a PEFT adapter plus the optimizer's moments.

Knows which files a checkpoint has and what is in them. Does not know where checkpoints are kept, who owns
them, or how a directory is written atomically (storage/checkpoints.py).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save

from twinkle_serve.engine.layout import AdapterLayout
from twinkle_serve.engine.peft_format import PLACEMENT, export_peft, import_peft
from twinkle_serve.engine.slots import LORA_ALPHA, AdapterState
from twinkle_serve.engine.tinker_format import export_tinker
from twinkle_serve.protocol.recipients import read_recipient
from twinkle_serve.storage import checkpoints

CONFIG, WEIGHTS, OPTIMIZER = "adapter_config.json", "adapter_model.safetensors", "optimizer.safetensors"


def save_adapter(
    directory: str, state: AdapterState, layout: AdapterLayout, base_model: str, manifest: Mapping[str, Any]
) -> int:
    """Write ``state`` as a checkpoint, with the moments if it has any. Returns the size in bytes.

    The manifest's ``layout`` "tinker" means that of the hosted service instead of PEFT's, which cannot be
    loaded here again. With ``age_recipients`` in it each file is encrypted to them.
    """
    config, tensors = export_peft(layout, state.weights, state.spec, base_model, LORA_ALPHA)
    if manifest.get("layout") == "tinker":
        tensors = export_tinker(layout, state.weights, state.spec)
        config = {name: setting for name, setting in config.items() if name not in PLACEMENT}
    files = {CONFIG: json.dumps(config, indent=1, sort_keys=True).encode(), WEIGHTS: save(tensors)}
    if state.exp_avg is not None and state.exp_avg_sq is not None:
        moments = {"exp_avg": state.exp_avg, "exp_avg_sq": state.exp_avg_sq}
        files[OPTIMIZER] = save({name: block.contiguous() for name, block in moments.items()})
    if manifest.get("age_recipients"):
        files = encrypted(files, manifest["age_recipients"])
    return checkpoints.write_checkpoint(directory, files, {**manifest, "step": state.step})


def encrypted(files: Mapping[str, bytes], recipients: Sequence[str]) -> dict[str, bytes]:
    """The same files as age (age-encryption.org) has them; their names say so."""
    import pyrage  # few exports need it

    keys = [read_recipient(key) for key in recipients]
    return {f"{name}.age": pyrage.encrypt(content, keys) for name, content in files.items()}


def load_adapter(directory: str, layout: AdapterLayout, optimizer: bool) -> AdapterState:
    """Read a checkpoint, verifying every file's sha256.

    Raises checkpoints.CheckpointError for a missing or damaged one and ValueError for one of another model
    or an encrypted one. One that is replaced meanwhile is that of before or the new one.
    A checkpoint saved before the first step has no moments; they start at zero.
    """
    return checkpoints.read_whole(
        directory, lambda manifest: _read(Path(directory), manifest, layout, optimizer)
    )


def _read(path: Path, manifest: Mapping[str, Any], layout: AdapterLayout, optimizer: bool) -> AdapterState:
    if manifest.get("age_recipients"):
        raise ValueError("this export is encrypted and cannot be loaded; load what it was made from")
    config = json.loads((path / CONFIG).read_bytes())
    weights, spec = import_peft(layout, config, load_file(path / WEIGHTS))
    state = AdapterState(spec, weights)
    if optimizer and OPTIMIZER in manifest["files"]:
        moments = load_file(path / OPTIMIZER)
        state.exp_avg = _block(moments, "exp_avg", weights)
        state.exp_avg_sq = _block(moments, "exp_avg_sq", weights)
        state.step = int(manifest["step"])
    return state


def _block(moments: Mapping[str, torch.Tensor], name: str, weights: torch.Tensor) -> torch.Tensor:
    block = moments.get(name)
    if block is None or block.shape != weights.shape or block.dtype != weights.dtype:
        raise ValueError(f"{OPTIMIZER}: {name} does not have the shape {list(weights.shape)} of this adapter")
    return block
