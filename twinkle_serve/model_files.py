"""A model's weight files on disk: which of them count, and whether one is whole.

Knows safetensors' header, and the index beside several files as transformers reads it. Does not read weights
(engine/sharding/files.py), and imports nothing heavy: `doctor` looks at models too.
"""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"


class DamagedModel(OSError):
    """A weight file is missing, cut short or changed; the message names it."""


def has_weights(directory: Path) -> bool:
    """Whether there are weight files of the kind that can be read in parts."""
    return (directory / INDEX).is_file() or (directory / SINGLE).is_file()


def listed_tensors(directory: Path) -> dict[str, str]:
    """Tensor to file name, out of the index where that counts: beside ``model.safetensors`` it does not, as
    for transformers. Raises DamagedModel."""
    path = directory / INDEX
    if (directory / SINGLE).is_file() or not path.is_file():
        return {}
    try:
        return dict(json.loads(path.read_bytes())["weight_map"])
    except (ValueError, KeyError, TypeError):
        raise DamagedModel(f"{path} is not a readable index") from None


def weight_files(directory: Path) -> list[str]:
    """The names of those that transformers would load. Raises DamagedModel."""
    return sorted(set(listed_tensors(directory).values())) or [SINGLE]


def check_whole(file: Path) -> None:
    """By header and length. Raises DamagedModel."""
    header, start = _header(file)
    try:
        ends = [value["data_offsets"][1] for name, value in header.items() if name != "__metadata__"]
        expected = start + max(ends, default=0)
    except (KeyError, TypeError, IndexError):
        raise DamagedModel(f"{file.name} has a damaged header") from None
    size = file.stat().st_size
    if size != expected:
        raise DamagedModel(f"{file.name} has {size} bytes instead of {expected}: fetch it again")


def _header(file: Path) -> tuple[dict[str, Any], int]:
    """What it says of each tensor, and where the tensors begin."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        start = stream.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else size
        if 8 + length > size:
            raise DamagedModel(f"{file.name} is not a whole safetensors file")
        try:
            header = json.loads(stream.read(length))
        except ValueError:
            header = None
    if not isinstance(header, dict):
        raise DamagedModel(f"{file.name} has a damaged header")
    return header, 8 + length
