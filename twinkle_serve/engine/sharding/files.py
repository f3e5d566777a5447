"""The tensors of a model's weight files, read one by one or slice by slice.

Knows safetensors, and says what is wrong with a directory before minutes were spent on it. Does not know
which files count (model_files.py), models, nor which of its tensors a rank needs.
"""

from __future__ import annotations

import hashlib
import logging
import socket
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from twinkle_serve.engine.sharding.ranks import Ranks
from twinkle_serve.model_files import INDEX, DamagedModel, listed_tensors, weight_files

logger = logging.getLogger(__name__)
CHECKSUMS = "SHA256SUMS"


class WeightFiles:
    """The tensors of a model directory by name. Opens every file at once, which reads their headers only.

    Raises DamagedModel.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._file_of: dict[str, Any] = {}
        for name in weight_files(directory):
            file = self._open(directory / name)
            self._file_of.update(dict.fromkeys(file.keys(), file))
        for name, path in listed_tensors(directory).items():
            if name not in self._file_of:
                raise DamagedModel(f"{directory / path} lacks {name}, which {INDEX} says it holds")

    def __contains__(self, name: str) -> bool:
        return name in self._file_of

    @property
    def names(self) -> frozenset[str]:
        return frozenset(self._file_of)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._file_of[name].get_slice(name).get_shape())

    def read(self, name: str, first: int = 0, end: int | None = None) -> torch.Tensor:
        """A tensor, or rows ``first:end`` of it; nothing else is read from disk."""
        return self._file_of[name].get_slice(name)[first:end]

    def verify(self, ranks: Ranks) -> None:
        """Compare the weight files with ``SHA256SUMS`` in the directory, as ``sha256sum`` writes it. Of ranks
        that read the same directory of one machine each takes a part; every machine's copy is compared.

        Raises DamagedModel, also if there is no such file or it does not list a weight file.
        """
        identity = self._directory.stat()
        place, count = ranks.sharing((socket.gethostname(), identity.st_dev, identity.st_ino))
        path = self._directory / CHECKSUMS
        if not path.is_file():
            raise DamagedModel(f"{path} is missing; write it with: sha256sum *.safetensors > {CHECKSUMS}")
        lines = [line.split(maxsplit=1) for line in path.read_text().splitlines() if line.strip()]
        wanted = {name.lstrip("*").strip(): digest for digest, name in lines}
        for name in weight_files(self._directory)[place::count]:
            logger.info("checking %s", self._directory / name)
            with (self._directory / name).open("rb") as file:
                found = hashlib.file_digest(file, "sha256").hexdigest()
            if wanted.get(name) != found:
                raise DamagedModel(f"{self._directory / name} does not have the sha256 in {CHECKSUMS}")

    def _open(self, path: Path) -> Any:
        if not path.is_file():
            raise DamagedModel(f"{path} is missing")
        try:
            return safe_open(path, framework="pt")
        except SafetensorError as error:
            raise DamagedModel(f"{path} is cut short or not a safetensors file: {error}") from None
