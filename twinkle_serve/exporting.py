"""``twinkle-serve export``: a checkpoint's adapter out of the storage, alone or merged into its base model.

Knows where checkpoints and base models lie on the operator's machine. Does not need a running server, and
asks nobody who owns what.
"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Any

from twinkle_serve.config import Config
from twinkle_serve.protocol.paths import parse_path
from twinkle_serve.storage import checkpoints
from twinkle_serve.storage.catalog import checkpoint_directory


def export(config: Config, path: str, output: Path, merged: bool) -> str:
    """Write the checkpoint at a ``tinker://`` path to the new directory ``output``; a line about it.

    Raises ValueError, checkpoints.CheckpointError, FileExistsError.
    """
    from twinkle_serve.engine.adapter_files import CONFIG, WEIGHTS
    from twinkle_serve.engine.merge import merge_adapter

    directory = Path(_directory(config, path))
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=".export-") as scratch:
        # A server may be overwriting the checkpoint, and merging takes long.
        adapter = Path(scratch)

        def bring(manifest: dict[str, Any]) -> dict[str, Any]:
            if manifest.get("layout") == "tinker":
                raise ValueError(f"{path} is an export for other tools; export what it was made from")
            for name in (CONFIG, WEIGHTS):
                shutil.copyfile(directory / name, adapter / name)
            return manifest

        manifest = checkpoints.read_whole(directory, bring)
        if merged:
            base = _base_model(config, manifest["base_model"])
            changed = merge_adapter(base, adapter, output)
            return f"{output}: {manifest['base_model']} with {changed} tensors changed by {path}"
        output.mkdir()
        for name in (CONFIG, WEIGHTS):
            (adapter / name).rename(output / name)
    return f"{output}: the adapter of {path}, for PEFT"


def _directory(config: Config, path: str) -> str:
    parsed = parse_path(path)
    return checkpoint_directory(config.storage.root, parsed.run_id, parsed.kind, parsed.name)


def _base_model(config: Config, name: str) -> Path:
    from twinkle_serve.hub.models import resolve_model

    for model in config.models:
        if model.name == name:
            return resolve_model(model.path, model.revision)
    raise ValueError(f"the checkpoint belongs to {name}, which this configuration does not serve")
