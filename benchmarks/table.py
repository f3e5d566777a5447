"""The table of ``make bench``: rows as they are found, printed, and kept as JSON.

Knows what a row holds and whether it reaches its target. Does not know how anything is measured.
"""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

Status = Literal["", "reached", "missed", "skipped", "failed"]
_OPERATORS = {">=": lambda value, aim: value >= aim, "<=": lambda value, aim: value <= aim}


@dataclass(frozen=True, slots=True)
class Row:
    """One figure.

    value: in ``unit``, which is "x" for a ratio; None for a row that could not be measured. target: "" or an
    operator and a number in the same unit, like ">= 0.85". cpu: what was used meanwhile, in seconds or as
    ratio, by name. load: of the machine, one minute, when the row was found. detail: the medians that the
    value was made from. note: what a reader must know, such as why there is no value.
    """

    part: str
    what: str
    value: float | None
    unit: str = "x"
    target: str = ""
    cpu: Mapping[str, float] = field(default_factory=dict)
    detail: Mapping[str, Any] = field(default_factory=dict)
    note: str = ""
    load: float = 0.0
    failed: bool = False

    @property
    def status(self) -> Status:
        if self.failed:
            return "failed"
        if self.value is None:
            return "skipped"
        if not self.target:
            return ""
        return "reached" if reaches(self.value, self.target) else "missed"


def reaches(value: float, target: str) -> bool:
    """Raises ValueError for a target that is not an operator and a number."""
    operator, _, aim = target.partition(" ")
    if operator not in _OPERATORS:
        raise ValueError(f"no target: {target!r}")
    return bool(_OPERATORS[operator](value, float(aim)))


class Rows:
    """Where a part puts what it finds: printed at once, and appended to a file of JSON lines, so that what
    was found stays if the part is ended."""

    def __init__(self, part: str, path: Path | None = None) -> None:
        self.part = part
        self.found: list[Row] = []
        self._path = path

    def add(
        self,
        what: str,
        value: float | None,
        unit: str = "x",
        target: str = "",
        *,
        why: str = "",
        **rest: Any,
    ) -> None:
        """why: what stands in the way, for a row that misses its target."""
        if why and value is not None and target and not reaches(value, target):
            rest["note"] = why
        row = Row(self.part, what, value, unit, target, load=round(os.getloadavg()[0], 2), **rest)
        self.found.append(row)
        print(line_of(row), flush=True)
        if self._path is not None:
            with self._path.open("a") as file:
                file.write(json.dumps(asdict(row)) + "\n")

    def skip(self, what: str, why: str) -> None:
        self.add(what, None, note=why)


def read_rows(path: Path) -> list[Row]:
    """The whole rows in a file of Rows; one that a kill cut short is left out."""
    if not path.exists():
        return []
    lines = path.read_text().splitlines(keepends=True)
    return [Row(**json.loads(line)) for line in lines if line.endswith("\n")]


def line_of(row: Row) -> str:
    value = "-" if row.value is None else f"{row.value:.3g} {row.unit}".replace(" x", "x")
    aim = f"{row.status} ({row.target})" if row.status in ("reached", "missed") else row.status
    note = f"  {row.note}" if row.note else ""
    return f"  {row.what:<66} {value:>14}  {aim:<18} load {row.load:4.1f}{note}"


def machine() -> dict[str, Any]:
    return {
        "cores": os.cpu_count(),
        "processor": _processor(),
        "python": platform.python_version(),
        "load": list(os.getloadavg()),
    }


def write(rows: Sequence[Row], directory: Path, **about: Any) -> Path:
    """``directory/<date>.json``; returns its path."""
    directory.mkdir(parents=True, exist_ok=True)
    now = datetime.now(UTC)
    path = directory / f"{now:%Y-%m-%d}.json"
    kept = [asdict(row) | {"status": row.status} for row in rows]
    tree = {"at": now.isoformat(timespec="seconds"), "machine": machine(), **about, "rows": kept}
    path.write_text(json.dumps(tree, indent=1) + "\n")
    return path


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()
