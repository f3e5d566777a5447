"""Adapters that are not in a slot: kept in host memory up to a budget, the least recently used on disk.

Knows AdapterStates by name. Does not know why one is here (a paged-out run or a sampling snapshot).
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
import shutil
import socket
import tempfile
from collections import OrderedDict
from pathlib import Path

from twinkle_serve.engine.slots import AdapterState
from twinkle_serve.engine.state_files import pack_state, read_state

logger = logging.getLogger(__name__)


def new_page_directory(parent: Path | None) -> Path:
    """A directory of this process below ``parent``, or below the system's temporary directory. Those of
    processes of this machine that were killed are removed."""
    parent = Path(tempfile.gettempdir()) if parent is None else parent
    parent.mkdir(parents=True, exist_ok=True)
    prefix = f"twinkle-pages-{socket.gethostname()}-"
    own = re.compile(rf"{re.escape(prefix)}(\d+)-[^-]+")
    for found in parent.iterdir() if Path("/proc/self").exists() else ():
        owner = own.fullmatch(found.name)
        if owner is not None and not Path("/proc", owner[1]).exists():
            shutil.rmtree(found, ignore_errors=True)
    return Path(tempfile.mkdtemp(prefix=f"{prefix}{os.getpid()}-", dir=parent))


class PageStore:
    """States by key. ``directory`` is scratch space of one process: its files die with the store's owner.

    overflows: keep in host memory, over the budget, what the disk cannot take; if not, ``put`` refuses it.
    """

    def __init__(self, directory: Path, host_bytes: int, *, overflows: bool = False) -> None:
        self._directory = directory
        self._budget = host_bytes
        self._overflows = overflows
        self._host: OrderedDict[str, AdapterState] = OrderedDict()
        self._disk: dict[str, int] = {}
        self.host_bytes = 0

    @property
    def disk_bytes(self) -> int:
        return sum(self._disk.values())

    def __contains__(self, key: str) -> bool:
        return key in self._host or key in self._disk

    def put(self, key: str, state: AdapterState) -> None:
        """Raises OSError when the disk cannot take what has to go there, unless this store overflows; ``key``
        is then not here, and all others are."""
        self.drop(key)
        self._host[key] = state
        self.host_bytes += state.num_bytes()
        try:
            while self.host_bytes > self._budget:
                self._spill(next(iter(self._host)))
        except OSError as error:
            if not self._overflows:
                self.drop(key)
                raise
            logger.error("paged adapters take %d bytes of host memory: %s", self.host_bytes, error)

    def get(self, key: str) -> AdapterState:
        """The state under ``key``, which stays here. Raises KeyError."""
        if key in self._host:
            self._host.move_to_end(key)
            return self._host[key]
        if key not in self._disk:
            raise KeyError(key)
        return read_state(self._path(key), checked=False)

    def pop(self, key: str) -> AdapterState:
        """The state under ``key``, which is forgotten here. Raises KeyError."""
        state = self.get(key)
        self.drop(key)
        return state

    def drop(self, key: str) -> None:
        state = self._host.pop(key, None)
        if state is not None:
            self.host_bytes -= state.num_bytes()
        if self._disk.pop(key, None) is not None:
            self._path(key).unlink()

    def _spill(self, key: str) -> None:
        state = self._host[key]
        self._directory.mkdir(parents=True, exist_ok=True)
        try:
            self._path(key).write_bytes(pack_state(state, checked=False))
        except OSError:
            self._path(key).unlink(missing_ok=True)
            raise
        del self._host[key]
        self.host_bytes -= state.num_bytes()
        self._disk[key] = state.num_bytes()

    def _path(self, key: str) -> Path:
        return self._directory / f"{hashlib.sha256(key.encode()).hexdigest()}.safetensors"
