"""What `up` holds on to while it serves. Whole services are started in test_cli.py."""

from __future__ import annotations

from pathlib import Path

import pytest

from twinkle_serve.up import UpError, sole_use


def test_a_root_is_served_by_one_service(tmp_path: Path) -> None:
    root = tmp_path / "new" / "store"
    with sole_use(root):
        with pytest.raises(UpError, match="store is in use by another `twinkle-serve up`"), sole_use(root):
            pass
        with sole_use(tmp_path / "other"):
            pass
    with sole_use(root):
        pass
