"""Where the files of runs and sampling snapshots lie, which the service itself keeps to survive a crash.

Knows names below the storage root. Does not know what is in a file (engine/state_files.py) or when one is
written. Users' checkpoints are elsewhere (catalog.py).
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Collection
from pathlib import Path
from urllib.parse import quote

from twinkle_serve.storage.checkpoints import STATE_SUFFIX
from twinkle_serve.storage.tie import ID_FILE

_log = logging.getLogger(__name__)
STATES = "runs"


class StateFiles:
    """Files below ``root/runs``, by plain names."""

    def __init__(self, root: str | Path) -> None:
        self._directory = Path(root).absolute() / STATES
        self._directory.mkdir(parents=True, exist_ok=True)

    def name_for(self, owner: str, detail: str) -> str:
        """A file name for any two texts, different for different ones. Of texts that are too long for the
        file system it is a name that no file can have."""
        return f"{quote(owner, safe='')}.{quote(detail, safe='')}{STATE_SUFFIX}"

    def path(self, name: str) -> str:
        return str(self._directory / name)

    def exists(self, name: str) -> bool:
        """False also for what cannot be the name of a file: recovery asks for every stored name."""
        try:
            return (self._directory / name).exists()
        except OSError:
            return False

    def free_bytes(self) -> int:
        """What is left on the file system."""
        return shutil.disk_usage(self._directory).free

    def remove(self, name: str) -> None:
        """Nothing happens if it is gone. What cannot be removed is left to ``sweep``, and said."""
        try:
            (self._directory / name).unlink(missing_ok=True)
        except (OSError, ValueError) as error:
            _log.warning("%.100s is not removed: %s", name, error.__class__.__name__)

    def sweep(self, keep: Collection[str]) -> None:
        """Remove what nobody knows any more, and what a killed writer left; for the start."""
        wanted = {ID_FILE, *keep}
        for path in self._directory.iterdir():
            if path.name not in wanted:
                _log.info("removing %s: nothing refers to it", path.name)
                self.remove(path.name)
