"""What a client sent, as a message shows it.

Knows how to keep that short, and quick. Does not know what was wrong with it.
"""

from __future__ import annotations


def shown(value: object, most: int = 64) -> str:
    """Texts are cut and numbers written out; of a list or an object only its kind is told: to write a
    large one out takes seconds."""
    if isinstance(value, str):
        return f"{value[:most]!r:.{most}}"
    if value is None or isinstance(value, bool | int | float):
        return f"{value!r:.{most}}"
    return "an object" if isinstance(value, dict) else f"a {type(value).__name__}"
