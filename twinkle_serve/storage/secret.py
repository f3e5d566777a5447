"""A secret that every process of a deployment shares: a file in the storage root.

Knows how to make it exactly once. Does not know what is signed with it.
"""

from __future__ import annotations

import os
import secrets
from pathlib import Path

_NAME = "signing.key"


def shared_secret(root: str | Path) -> bytes:
    """The 32 bytes that all processes with this storage root get; readable by its owner only."""
    path = Path(root) / _NAME
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists():
        draft = path.with_name(f".{_NAME}.{secrets.token_hex(8)}")
        draft.touch(mode=0o600)
        draft.write_bytes(secrets.token_bytes(32))
        try:
            os.link(draft, path)  # fails if another process was faster, whose secret then counts
        except FileExistsError:
            pass
        finally:
            draft.unlink()
    return path.read_bytes()
