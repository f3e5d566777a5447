"""Losses that an operator allows: a directory with ``loss.json`` and ``loss.py``, local or on ModelScope.

Knows how to fetch and hash one, and what its manifest may say. Does not know torch and runs nothing: only a
rank does (engine/whitelist.py), and only the bytes that were hashed here.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

from pydantic import ValidationError

from twinkle_serve.hub.models import SCHEME, resolve_model
from twinkle_serve.loss_config import LossTerms, WhitelistedLoss
from twinkle_serve.protocol.losses import LOSSES, TARGETS, UPLOADED, LossSpec

MANIFEST, CODE = "loss.json", "loss.py"
MAX_BYTES = 2**20


class LossSourceError(ValueError):
    """What is wrong with a loss; one line for the operator."""


@dataclass(frozen=True, slots=True)
class LossSource:
    """terms: what the manifest says. code: the text of loss.py. sha256: of both files."""

    terms: LossTerms
    code: str
    sha256: str


def fetch_loss(path: str, revision: str | None) -> LossSource:
    """Raises LossSourceError."""
    if path.startswith(SCHEME) and not revision:
        raise LossSourceError(f"{path} needs a revision: what a branch points to can change")
    try:
        directory = resolve_model(path, revision)
        manifest, code = ((directory / name).read_bytes() for name in (MANIFEST, CODE))
    except (OSError, ValueError) as error:
        raise LossSourceError(f"{path} cannot be read: {error}") from None
    if len(manifest) + len(code) > MAX_BYTES:
        raise LossSourceError(f"{path} has {len(manifest) + len(code)} bytes; at most {MAX_BYTES} are read")
    try:
        terms = LossTerms.model_validate_json(manifest)
        text = code.decode()
    except ValidationError as error:
        detail = error.errors()[0]
        raise LossSourceError(
            f"{path}/{MANIFEST}: {'.'.join(map(str, detail['loc']))}: {detail['msg']}"
        ) from None
    except UnicodeDecodeError:
        raise LossSourceError(f"{path}/{CODE} is not UTF-8") from None
    if terms.name in LOSSES or terms.name in (UPLOADED, "stable_reinforce"):
        raise LossSourceError(f"{path}: the name {terms.name!r} is taken")
    if TARGETS in (*terms.inputs, *terms.optional):
        raise LossSourceError(
            f"{path}/{MANIFEST}: {TARGETS} is always sent; leave it out of inputs and optional"
        )
    if twice := set(terms.inputs) & set(terms.optional):
        raise LossSourceError(f"{path}/{MANIFEST}: {min(twice)} is in inputs and in optional")
    return LossSource(terms, text, digest(manifest, code))


def digest(manifest: bytes, code: bytes) -> str:
    """One hash of both files, which also says where the first one ends."""
    return hashlib.sha256(hashlib.sha256(manifest).digest() + hashlib.sha256(code).digest()).hexdigest()


def verified(entry: WhitelistedLoss) -> LossSource:
    """The loss that an entry of the whitelist names. Raises LossSourceError if it is not what was added."""
    source = fetch_loss(entry.path, entry.revision)
    if source.sha256 != entry.sha256:
        raise LossSourceError(
            f"{entry.name}: {entry.path} has sha256 {source.sha256}, but {entry.sha256} was allowed"
        )
    if source.terms.model_dump() != entry.model_dump(include=set(LossTerms.model_fields)):
        raise LossSourceError(f"{entry.name}: the configuration says something else than its {MANIFEST}")
    return source


def spec_of(terms: LossTerms) -> LossSpec:
    """What the gateway checks requests by."""
    settings = {name: float(value) for name, value in terms.settings.items()}
    return LossSpec(terms.name, (TARGETS, *terms.inputs), tuple(terms.optional), settings)
