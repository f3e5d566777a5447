"""API keys: shown once, kept as hashes, and gone when revoked."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from twinkle_serve.storage.keys import KeyStore


@pytest.fixture
def store(tmp_path: Path) -> Iterator[KeyStore]:
    store = KeyStore(tmp_path)
    yield store
    store.close()


def test_a_key_finds_its_tenant_and_no_other_text_does(store: KeyStore) -> None:
    alice, bob = store.create("alice"), store.create("bob")
    assert alice.startswith("tml-")
    found, other = store.find(alice), store.find(bob)
    assert found is not None
    assert other is not None
    assert (found.name, other.name) == ("alice", "bob")
    assert found.tenant != other.tenant
    for text in ("", "tml-", alice[:-1], alice.upper(), alice + " ", "tml-\udcff"):
        assert store.find(text) is None


def test_the_key_itself_is_nowhere_on_disk(store: KeyStore, tmp_path: Path) -> None:
    secret = store.create("alice").removeprefix("tml-").encode()
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert files
    assert not [path for path in files if secret in path.read_bytes()]


def test_a_rotated_key_keeps_its_tenant(store: KeyStore) -> None:
    old = store.create("alice")
    tenant = store.find(old)
    new = store.rotate("alice")
    found = store.find(new)
    assert store.find(old) is None
    assert found is not None
    assert tenant is not None
    assert found.tenant == tenant.tenant


def test_a_revoked_key_is_nobodys_and_its_name_is_free_for_a_new_tenant(store: KeyStore) -> None:
    old = store.create("alice")
    before = store.find(old)
    store.revoke("alice")
    assert store.find(old) is None
    after = store.find(store.create("alice"))
    assert before is not None
    assert after is not None
    assert before.tenant != after.tenant
    assert [record.revoked_at is None for record in store.list()] == [False, True]


def test_another_process_sees_it_at_once(store: KeyStore, tmp_path: Path) -> None:
    other = KeyStore(tmp_path)
    key = store.create("alice")
    assert other.find(key) is not None
    other.revoke("alice")
    assert store.find(key) is None
    other.close()


@pytest.mark.parametrize("action", ["rotate", "revoke"])
def test_unknown_names_are_refused(store: KeyStore, action: str) -> None:
    with pytest.raises(ValueError, match="'nobody' has no key"):
        getattr(store, action)("nobody")


def test_a_name_has_one_key(store: KeyStore) -> None:
    store.create("alice")
    with pytest.raises(ValueError, match="already"):
        store.create("alice")
    with pytest.raises(ValueError, match="name"):
        store.create(" ")
