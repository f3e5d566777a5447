"""SECURITY.md names the code that checks and the tests that show it; both must be there."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_what_the_page_names_exists() -> None:
    names = set(re.findall(r"`((?:[a-z_0-9]+/)*[a-z_0-9]+\.py)`", (ROOT / "SECURITY.md").read_text()))
    assert len(names) > 15
    for name in names:
        places = [ROOT / name, ROOT / "twinkle_serve" / name, *(ROOT / "tests").rglob(name)]
        assert any(place.is_file() for place in places), name
