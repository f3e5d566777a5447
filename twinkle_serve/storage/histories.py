"""Curves of runs on disk, one small JSON file a run, so that they outlive the coordinator.

Knows files. Does not know what a curve means; a file that cannot be read is as good as none.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote

logger = logging.getLogger(__name__)
FOLDER = "history"


class HistoryFiles:
    """Below ``root``. What was written last counts; nothing else depends on it."""

    def __init__(self, root: str | Path) -> None:
        self._folder = Path(root) / FOLDER

    def load(self, run_id: str) -> Mapping[str, Any] | None:
        try:
            found = json.loads(self._path(run_id).read_bytes())
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            logger.warning("the curves of %s cannot be read: %s", run_id, error)
            return None
        return found if isinstance(found, dict) else None

    def save(self, histories: Iterable[tuple[str, Mapping[str, Any]]]) -> None:
        """Each whole or not at all. A full disk costs curves and is logged, nothing else."""
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            for run_id, state in histories:
                path = self._path(run_id)
                draft = path.with_suffix(".draft")
                draft.write_text(json.dumps(state))
                os.replace(draft, path)
        except OSError as error:
            logger.warning("curves cannot be saved: %s", error)

    def _path(self, run_id: str) -> Path:
        return self._folder / f"{quote(run_id, safe='')}.json"
