"""A budget in words: every line with its arithmetic, the sum, and whether it fits.

Knows how numbers are printed. Does not know where they come from (budget.py).
"""

from __future__ import annotations

from collections.abc import Iterator

from twinkle_serve.plan.budget import GIB, USABLE, Budget, Line


def report(budget: Budget) -> str:
    """Several lines of text, without a newline at the end."""
    return "\n".join(_lines(budget))


def verdict(budget: Budget) -> str:
    """One line: by how much it fits or not, and what takes most."""
    name, total = budget.config.name, _gib(budget.num_bytes)
    if budget.limit is None:
        return f"{name}: {total} GiB a rank; gpu_memory_bytes is not set, so nothing was compared"
    limit = _gib(budget.limit)
    if budget.fits:
        return (
            f"{name}: fits; {total} of {limit} GiB a rank, {_gib(budget.limit - budget.num_bytes)} to spare"
        )
    parts = {line.part: budget.part(line.part) for line in budget.lines}
    largest = sorted(parts, key=lambda part: -parts[part])[:3]
    worst = ", ".join(f"{part} {_gib(parts[part])}" for part in largest)
    over = _gib(budget.num_bytes - budget.limit)
    return f"{name}: does not fit; {total} of {limit} GiB a rank, {over} too much (most of it: {worst})"


def _lines(budget: Budget) -> Iterator[str]:
    config, shapes = budget.config, budget.shapes
    ranks = f"{config.ranks} ranks ({config.sharding})" if config.ranks > 1 else "1 rank"
    groups = f", {config.groups} groups" if config.groups > 1 else ""
    yield f"{config.name}: {shapes.num_parameters:,} parameters, {ranks}{groups}"
    yield f"an adapter of rank {config.max_rank}: {config.max_rank * shapes.lora_columns:,} parameters"
    yield "GiB of each rank:"
    for line in budget.lines:
        yield _line(line)
    yield f"  {_gib(budget.num_bytes):>8}  in all"
    if budget.config.gpu_memory_bytes is not None:
        assert budget.limit is not None
        stated = _gib(budget.config.gpu_memory_bytes)
        yield f"  {_gib(budget.limit):>8}  can be used: {USABLE:.0%} of gpu_memory_bytes, {stated}"
    yield "GiB of host memory for each rank, at most:"
    for line in budget.host_lines:
        yield _line(line)
    yield verdict(budget)


def _line(line: Line) -> str:
    return f"  {_gib(line.num_bytes):>8}  {line.part:<12} {line.what:<40} {line.arithmetic}"


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / GIB:,.2f}"
