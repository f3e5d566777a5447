"""Public keys of age (age-encryption.org), to which a client wants an export encrypted.

Knows what one looks like. Does not encrypt.
"""

from __future__ import annotations

from collections.abc import Sequence

from twinkle_serve.protocol.errors import UserError

MAX_RECIPIENTS = 10


def check_recipients(recipients: Sequence[str]) -> tuple[str, ...]:
    """The keys, unchanged. Raises UserError naming the first that is none."""
    from pyrage import RecipientError, x25519  # few exports need it

    if len(recipients) > MAX_RECIPIENTS:
        raise UserError(
            f"age_encryption_recipients: {len(recipients)}; at most {MAX_RECIPIENTS} are possible"
        )
    for key in recipients:
        try:
            x25519.Recipient.from_str(key)
        except RecipientError:
            raise UserError(
                f"age_encryption_recipients: {key!r:.80} is not an age X25519 key (age1...)"
            ) from None
    return tuple(recipients)
