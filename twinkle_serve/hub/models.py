"""Where a base model's files are: a local directory, or a pinned revision fetched from ModelScope.

Knows model references (``/dir``, ``ms://owner/model``). Does not know what is in the files (engine/).
"""

from __future__ import annotations

import re
from pathlib import Path

SCHEME = "ms://"


def resolve_model(reference: str, revision: str | None = None) -> Path:
    """The local directory of a model, downloaded first if it is an ``ms://`` reference.

    Raises FileNotFoundError naming a local directory that is not there, and ValueError for a malformed
    reference; download errors are modelscope's.
    """
    if reference.startswith(SCHEME):
        if not re.fullmatch(r"ms://[^/]+/[^/]+", reference):
            raise ValueError(f"model reference {reference!r} is not of the form ms://owner/model")
        # Imported here: modelscope takes seconds to import and local models do not need it.
        from modelscope import snapshot_download

        return Path(snapshot_download(reference.removeprefix(SCHEME), revision=revision))
    directory = Path(reference).expanduser().resolve()
    if not directory.is_dir():
        raise FileNotFoundError(f"base model directory {directory} does not exist")
    return directory
