"""Datums are shared out completely, in order, about evenly, and the same by every rank."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from twinkle_serve.engine.sharding.division import balance, divide
from twinkle_serve.protocol.work import Piece

lengths = st.lists(st.lists(st.integers(1, 500), min_size=1, max_size=6), min_size=1, max_size=5)


@given(lengths, st.integers(1, 5))
def test_every_datum_is_on_one_rank(lengths: list[list[int]], size: int) -> None:
    pieces = [Piece(index, tuple(range(10, 10 + len(datums)))) for index, datums in enumerate(lengths)]
    by_rank = divide(pieces, lengths, size)
    assert len(by_rank) == size
    found = [(piece.pass_index, i) for pieces in by_rank for piece in pieces for i in piece.indices]
    assert sorted(found) == [(piece.pass_index, i) for piece in pieces for i in piece.indices]
    for share in by_rank:
        keys = [(piece.pass_index, piece.indices) for piece in share]
        assert keys == sorted(keys)
        assert all(list(piece.indices) == sorted(piece.indices) for piece in share)


def test_one_rank_has_the_pieces_as_they_were() -> None:
    pieces = [Piece(3, (0, 5)), Piece(1, (2,))]
    assert divide(pieces, [[4, 4], [9]], 1) == [pieces]


@given(st.lists(st.integers(1, 500), min_size=1, max_size=30), st.integers(1, 6))
def test_no_rank_has_more_than_another_by_more_than_one_load(loads: list[int], size: int) -> None:
    totals = [0] * size
    for load, taker in zip(loads, balance(loads, size), strict=True):
        totals[taker] += load
    assert max(totals) - min(totals) <= max(loads)


def test_the_longest_have_ranks_of_their_own() -> None:
    assert balance([5, 100, 5, 90], 2) == [1, 0, 1, 1]
