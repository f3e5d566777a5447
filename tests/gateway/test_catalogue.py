"""Every address that the installed SDK has is served here, or is on the list of those that are not."""

from __future__ import annotations

import re
from pathlib import Path

import tinker

from tests.gateway.world import make_config
from twinkle_serve.gateway.app import PREFIX, create_app

PAGE = Path(__file__).parents[2] / "docs" / "api.md"


def in_the_sdk() -> set[str]:
    """Paths below the prefix, with {} for what is filled in."""
    found: set[str] = set()
    for path in Path(tinker.__file__).parent.rglob("*.py"):
        if not path.name.endswith("_test.py"):
            found |= set(re.findall(rf'"{PREFIX}/([^"?]+)"', path.read_text()))
    return {re.sub(r"{[^}]+}", "{}", path) for path in found}


def served() -> list[re.Pattern[str]]:
    app = create_app(lambda: None, make_config(Path("/nowhere")))  # type: ignore[arg-type,return-value]
    paths = [path.removeprefix(f"{PREFIX}/") for path in app.openapi()["paths"]]
    # A checkpoint's id is one part to the SDK and two in a path.
    return [re.compile(re.sub(r"{[^}]+}", "[^/]+", path)) for path in paths]


def test_what_is_not_served_is_listed() -> None:
    asked = {path.replace("checkpoints/{}", "checkpoints/weights/x") for path in in_the_sdk()}
    assert len(asked) > 40
    routes = served()
    missing = {path for path in asked if not any(route.fullmatch(path) for route in routes)}
    text = PAGE.read_text()
    assert {path for path in missing if f"`{path}`" not in text} == set()
    assert len(missing) <= 3
