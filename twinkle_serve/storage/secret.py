"""A secret that every process of a deployment shares: a file in the storage root.

Knows how to make it exactly once. Does not know what is signed with it.
"""

from __future__ import annotations

import os
import secrets
from pathlib import Path

_NAME = "signing.key"
_NUM_BYTES = 32


def shared_secret(root: str | Path) -> bytes:
    """The 32 bytes that all processes with this storage root get; readable by its owner only. Raises OSError
    if the file is damaged: what is signed with less could be forged."""
    path = Path(root) / _NAME
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        draft = path.with_name(f".{_NAME}.{secrets.token_hex(8)}")
        draft.touch(mode=0o600)
        with draft.open("r+b") as file:
            file.write(secrets.token_bytes(_NUM_BYTES))
            file.flush()
            os.fsync(file.fileno())  # before it has its name: a power cut must not leave an empty one
        try:
            os.link(draft, path)  # fails if another process was faster, whose secret then counts
        except FileExistsError:
            pass
        finally:
            draft.unlink()
    secret = path.read_bytes()
    if len(secret) != _NUM_BYTES:
        raise OSError(
            f"{path} is damaged: {len(secret)} bytes instead of {_NUM_BYTES}; put back its backup, or "
            "remove it and with it all keys, links and sign-ins"
        )
    return secret
