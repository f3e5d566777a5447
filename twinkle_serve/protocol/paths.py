"""Names of checkpoints: ``tinker://<run id>/<kind>/<name>``, and ``twinkle://`` for the same.

Knows what a valid name is. Does not know whether a checkpoint exists or where it lies on disk.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from twinkle_serve.protocol.errors import UserError
from twinkle_serve.protocol.showing import shown

KINDS = ("weights", "sampler_weights", "external_weights")
MAX_NAME_LENGTH = 128
MAX_RUN_ID_LENGTH = 200
_SCHEMES = ("tinker://", "twinkle://")
_NAME = re.compile(r"[A-Za-z0-9._-]+")
_RUN_ID = re.compile(r"[A-Za-z0-9._:-]+")
# Words that follow a checkpoint's name in a URL.
_RESERVED = frozenset({"publish", "ttl", "archive", "external_weights_urls", ".", ".."})


@dataclass(frozen=True, slots=True)
class CheckpointPath:
    """Where a client thinks a checkpoint is. ``str()`` is the canonical ``tinker://`` form."""

    run_id: str
    kind: str
    name: str

    def __str__(self) -> str:
        return f"tinker://{self.run_id}/{self.kind}/{self.name}"

    @property
    def checkpoint_id(self) -> str:
        return f"{self.kind}/{self.name}"


def parse_path(path: object) -> CheckpointPath:
    """Split a checkpoint path. Raises UserError saying what a path looks like."""
    if isinstance(path, str):
        for scheme in _SCHEMES:
            parts = path.removeprefix(scheme).split("/")
            if path.startswith(scheme) and len(parts) == 3 and _is_path(*parts):
                return CheckpointPath(*parts)
    raise UserError(f"path {shown(path, 200)} is not of the form tinker://RUN_ID/{{{'|'.join(KINDS)}}}/NAME")


def validate_name(name: object, field: str = "path") -> str:
    """A name for a new checkpoint, unchanged. Raises UserError with the rule it breaks."""
    if not isinstance(name, str) or not _NAME.fullmatch(name) or len(name) > MAX_NAME_LENGTH:
        raise UserError(
            f"{field} {shown(name)}: a checkpoint's name is 1 to {MAX_NAME_LENGTH} "
            "of letters, digits, '.', '_' and '-'"
        )
    if name in _RESERVED:
        raise UserError(f"{field} {name!r} is reserved; choose another name")
    return name


def _is_path(run_id: str, kind: str, name: str) -> bool:
    named = _NAME.fullmatch(name) is not None and name not in _RESERVED and len(name) <= MAX_NAME_LENGTH
    if len(run_id) > MAX_RUN_ID_LENGTH:
        return False
    return kind in KINDS and named and _RUN_ID.fullmatch(run_id) is not None and run_id not in _RESERVED
