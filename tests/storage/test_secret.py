"""The shared secret: one for everybody with the same root."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from twinkle_serve.storage.secret import shared_secret


def test_everybody_gets_the_same_one_and_roots_differ(tmp_path: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        secrets = set(pool.map(lambda _: shared_secret(tmp_path / "one"), range(32)))
    assert len(secrets) == 1
    assert len(secrets.pop()) == 32
    assert shared_secret(tmp_path / "one") != shared_secret(tmp_path / "two")


def test_only_the_owner_can_read_it_and_no_draft_is_left(tmp_path: Path) -> None:
    shared_secret(tmp_path)
    assert os.listdir(tmp_path) == ["signing.key"]
    assert (tmp_path / "signing.key").stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("num_bytes", [0, 31, 33])
def test_a_damaged_one_is_refused(tmp_path: Path, num_bytes: int) -> None:
    (tmp_path / "signing.key").write_bytes(bytes(num_bytes))
    with pytest.raises(OSError, match=rf"signing\.key is damaged: {num_bytes} bytes"):
        shared_secret(tmp_path)
