"""What the pages take from the code when the site is built: settings, metrics, and what was measured.

A line ``<!-- from the code: NAME -->`` in a page is replaced. Knows tables in Markdown.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

ROOT = Path(__file__).parent.parent
_MARK = re.compile(r"^<!-- from the code: (\w+) -->$", re.M)


def on_page_markdown(markdown: str, **_: Any) -> str:
    """For mkdocs. Raises KeyError for a name that is not in TABLES."""
    return _MARK.sub(lambda found: TABLES[found[1]](), markdown)


def settings() -> str:
    """Every key of the configuration."""
    from twinkle_serve.config import Config

    rows = ["| key | default | |", "|---|---|---|"]
    rows += _rows(Config, "")
    return "\n".join(rows)


def metrics() -> str:
    from twinkle_serve.control.metrics import markdown

    return markdown()


def measured() -> str:
    """All rows of benchmarks/results, a table for each file."""
    parts = []
    for file in sorted((ROOT / "benchmarks" / "results").glob("*.json")):
        tree = json.loads(file.read_text())
        parts.append(f"### {file.stem}\n")
        if tree.get("note"):
            parts.append(f"{tree['note']}.\n")
        parts.append("| what | measured | target | load |\n|---|---|---|---|")
        parts += [measured_row(row) for row in tree["rows"]]
        parts.append("")
    return "\n".join(parts)


def measured_row(row: dict[str, Any]) -> str:
    """One line of a table: the figure, and behind it what its note says of it."""
    value = row.get("value", row.get("ratio"))
    note = row.get("note") or row.get("why") or ""
    figure = "not measured" if value is None else f"{value:.3g} {row.get('unit', '')}".rstrip()
    shown = f"{figure}: {note}" if note else figure
    what = ": ".join(filter(None, [row.get("part"), row["what"]]))
    return (
        f"| {_cell(what)} | {_cell(shown)} | {_cell(row.get('target') or '–')} | {row.get('load', 0):.1f} |"
    )


TABLES: dict[str, Callable[[], str]] = {"settings": settings, "metrics": metrics, "measured": measured}


def _rows(model: type[BaseModel], prefix: str) -> list[str]:
    rows: list[str] = []
    for name, field in model.model_fields.items():
        inner = _models_in(field.annotation)
        key = prefix + name
        if not inner:
            rows.append(f"| `{key}` | {_default(field)} | {_cell(_words(field))} |")
        elif getattr(field.annotation, "__origin__", None) is dict:
            rows.append(f"| `{key}.NAME` | | {_cell(field.description or '')} |")
        else:
            index = ".0." if getattr(field.annotation, "__origin__", None) is list else "."
            rows += _rows(inner[0], key + index)
    return rows


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for part in get_args(annotation) for model in _models_in(part)]


def _default(field: FieldInfo) -> str:
    if field.default is PydanticUndefined:
        return "" if field.default_factory is None else "none"
    return f"`{'null' if field.default is None else field.default}`"


def _words(field: FieldInfo) -> str:
    limits = [
        f"{sign} {getattr(item, name)}"
        for item in field.metadata
        for name, sign in (("ge", "≥"), ("gt", ">"), ("le", "≤"), ("lt", "<"))
        if getattr(item, name, None) is not None
    ]
    choices = [repr(choice) for choice in get_args(field.annotation) if isinstance(choice, str)]
    parts = [field.description or "", ", ".join(limits), " or ".join(choices)]
    return "; ".join(part for part in parts if part)


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
