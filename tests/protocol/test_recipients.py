from __future__ import annotations

import pytest
from pyrage import x25519

from twinkle_serve.protocol.errors import UserError
from twinkle_serve.protocol.recipients import MAX_RECIPIENTS, check_recipients


def test_public_keys_pass() -> None:
    keys = [str(x25519.Identity.generate().to_public()) for _ in range(MAX_RECIPIENTS)]
    assert check_recipients(keys) == tuple(keys)
    assert check_recipients([]) == ()


@pytest.mark.parametrize("key", ["", "age1", "ssh-ed25519 AAAA", "\x00", "AGE-SECRET-KEY-1QQQ"])
def test_anything_else_is_refused_by_name(key: str) -> None:
    with pytest.raises(UserError, match="age_encryption_recipients"):
        check_recipients([key])
    with pytest.raises(UserError, match="at most 10"):
        check_recipients([str(x25519.Identity.generate().to_public())] * (MAX_RECIPIENTS + 1))
