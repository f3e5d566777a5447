from __future__ import annotations

import pytest
from cryptography.hazmat.primitives.asymmetric import ed25519, rsa
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from pyrage import x25519

from twinkle_serve.protocol.errors import UserError
from twinkle_serve.protocol.recipients import MAX_KEY_LENGTH, MAX_RECIPIENTS, check_recipients


def test_public_keys_pass() -> None:
    keys = [str(x25519.Identity.generate().to_public()) for _ in range(MAX_RECIPIENTS)]
    assert check_recipients(keys) == tuple(keys)
    assert check_recipients([]) == ()


def ssh_key(key: ed25519.Ed25519PublicKey | rsa.RSAPublicKey) -> str:
    return key.public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH).decode()


def test_public_keys_of_ssh_pass_with_or_without_a_comment() -> None:
    keys = [
        ssh_key(ed25519.Ed25519PrivateKey.generate().public_key()),
        ssh_key(rsa.generate_private_key(65537, 2048).public_key()) + " me@home",
        str(x25519.Identity.generate().to_public()),
    ]
    assert check_recipients(keys) == tuple(keys)
    with pytest.raises(UserError, match="age_encryption_recipients: a key has 4097 characters; at most 4096"):
        check_recipients([keys[0].ljust(MAX_KEY_LENGTH + 1, "x")])


def ssh_rsa(bits: int) -> str:
    """As many bits as that, if not a product of two primes: a key of 8,192 takes long to find."""
    return ssh_key(rsa.RSAPublicNumbers(65537, 2 ** (bits - 1) + 1).public_key())


@pytest.mark.parametrize("bits", [1024, 2047, 4097, 8192])
def test_ssh_rsa_of_other_lengths_is_refused_with_the_range(bits: int) -> None:
    with pytest.raises(UserError, match="ssh-rsa of 2,048 to 4,096 bits"):
        check_recipients([ssh_rsa(bits)])
    keys = [ssh_rsa(2048), ssh_rsa(4096)]
    assert check_recipients(keys) == tuple(keys)


EMPTY_NUMBERS = "ssh-rsa AAAAB3NzaC1yc2EAAAABAAAAAA=="


@pytest.mark.parametrize(
    "key", ["", "age1", "ssh-ed25519 AAAA", "ssh-rsa AAAA", EMPTY_NUMBERS, "\x00", "AGE-SECRET-KEY-1QQQ"]
)
def test_anything_else_is_refused_by_name(key: str) -> None:
    with pytest.raises(UserError, match="age_encryption_recipients"):
        check_recipients([key])
    with pytest.raises(UserError, match="at most 10"):
        check_recipients([str(x25519.Identity.generate().to_public())] * (MAX_RECIPIENTS + 1))
