"""Public keys to which a client wants an export encrypted with age (age-encryption.org).

Knows what one looks like: age's own, and those of SSH. Does not encrypt.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from twinkle_serve.protocol.errors import UserError

MAX_RECIPIENTS = 10
MAX_KEY_LENGTH = 4096
"""Characters; the longest SSH key, ssh-rsa of 4,096 bits, has 724 without its comment."""


def check_recipients(recipients: Sequence[str]) -> tuple[str, ...]:
    """The keys, unchanged. Raises UserError naming the first that is none."""
    if len(recipients) > MAX_RECIPIENTS:
        raise UserError(
            f"age_encryption_recipients: {len(recipients)}; at most {MAX_RECIPIENTS} are possible"
        )
    for key in recipients:
        if len(key) > MAX_KEY_LENGTH:
            raise UserError(
                f"age_encryption_recipients: a key has {len(key)} characters; at most {MAX_KEY_LENGTH} are "
                "possible"
            )
        read_recipient(key)
    return tuple(recipients)


def read_recipient(key: str) -> Any:
    """``key`` as pyrage encrypts to it. Raises UserError."""
    from pyrage import RecipientError, ssh, x25519  # few exports need it

    try:
        return ssh.Recipient.from_str(key) if key.startswith("ssh-") else x25519.Recipient.from_str(key)
    except BaseException as error:
        # age panics over an SSH key with an empty number, and pyrage passes that on as no Exception.
        if not isinstance(error, RecipientError) and type(error).__name__ != "PanicException":
            raise
        raise UserError(
            f"age_encryption_recipients: {key!r:.80} is neither an age X25519 key (age1...) nor an SSH "
            "public key (ssh-ed25519, or ssh-rsa of 2,048 to 4,096 bits)"
        ) from None
