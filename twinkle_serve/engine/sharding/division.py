"""Which rank takes which datums of a microbatch.

Knows lengths only, so every rank comes to the same answer by itself. Does not know what is in a datum.
"""

from __future__ import annotations

from collections.abc import Sequence

from twinkle_serve.protocol.work import Piece


def divide(pieces: Sequence[Piece], lengths: Sequence[Sequence[int]], size: int) -> list[list[Piece]]:
    """The datums of ``pieces`` for each of ``size`` ranks, in the same order; a rank may get none.

    lengths: tokens of each datum of each piece.
    """
    if size == 1:
        return [list(pieces)]
    takers = iter(balance([length for piece in lengths for length in piece], size))
    by_rank: list[list[Piece]] = [[] for _ in range(size)]
    for piece in pieces:
        taken: list[list[int]] = [[] for _ in range(size)]
        for index in piece.indices:
            taken[next(takers)].append(index)
        for rank, indices in enumerate(taken):
            if indices:
                by_rank[rank].append(Piece(piece.pass_index, tuple(indices)))
    return by_rank


def balance(loads: Sequence[int], size: int) -> list[int]:
    """A rank for each load, so that ranks get about the same: the largest first, each to the rank that has
    least so far."""
    totals = [0] * size
    takers = [0] * len(loads)
    for index in sorted(range(len(loads)), key=lambda i: (-loads[i], i)):
        least = min(range(size), key=lambda rank: (totals[rank], rank))
        totals[least] += loads[index]
        takers[index] = least
    return takers
