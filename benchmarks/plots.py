"""Pictures of a table of rows: one bar chart a part, drawn against the targets.

Knows rows and matplotlib. Does not know how anything was measured.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from benchmarks.table import Row

_COLOURS = {"reached": "#2a9d5c", "missed": "#d1495b", "": "#4c78a8"}


def draw(rows: Sequence[Row], directory: Path) -> list[Path]:
    """``directory/<part>.png`` for each part with a figure; returns the paths."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    paths = []
    for part in dict.fromkeys(row.part for row in rows):
        drawn = [row for row in rows if row.part == part and row.value is not None]
        if not drawn:
            continue
        directory.mkdir(parents=True, exist_ok=True)
        figure, axes = pyplot.subplots(figsize=(11, 1.2 + 0.34 * len(drawn)))
        widths = [progress(row) for row in drawn]
        places = range(len(drawn))
        axes.barh(places, widths, color=[_COLOURS[row.status] for row in drawn])
        axes.set_yticks(places, [row.what for row in drawn], fontsize=8)
        axes.invert_yaxis()
        axes.axvline(1.0, color="black", linewidth=0.8, linestyle="--")
        for place, (row, width) in enumerate(zip(drawn, widths, strict=True)):
            aim = f"  (target {row.target})" if row.target else ""
            axes.annotate(f" {row.value:.3g} {row.unit}{aim}", (width, place), va="center", fontsize=8)
        axes.set_xscale("symlog", linthresh=1.0)
        axes.margins(x=0.35)
        axes.set_xlabel(
            "how far the target is reached (dashed: just reached); without one, the figure itself"
        )
        axes.set_title(part)
        figure.tight_layout()
        path = directory / f"{part}.png"
        figure.savefig(path, dpi=110)
        pyplot.close(figure)
        paths.append(path)
    return paths


def progress(row: Row) -> float:
    """1 where the target is just reached, more where it is surpassed; the value itself without a target."""
    assert row.value is not None
    if not row.target:
        return row.value
    operator, _, aim = row.target.partition(" ")
    if operator == ">=":
        return row.value / float(aim)
    return float(aim) / row.value if row.value > 0 else 1.0
