from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from twinkle_serve.control.microbatches import Load, pack
from twinkle_serve.protocol.work import Piece

LOADS = st.lists(
    st.builds(Load, st.integers(0, 4), st.booleans(), st.lists(st.integers(1, 60), min_size=1, max_size=6)),
    max_size=8,
)


def tokens(loads, batch):
    return sum(loads[piece.pass_index].lengths[i] for piece in batch for i in piece.indices)


@given(LOADS, st.integers(1, 100), st.booleans())
def test_every_datum_is_in_exactly_one_microbatch_within_the_budget(loads, budget, deterministic):
    batches = pack(loads, budget, deterministic)
    placed = [(piece.pass_index, i) for batch in batches for piece in batch for i in piece.indices]
    assert sorted(placed) == [(p, i) for p, load in enumerate(loads) for i in range(len(load.lengths))]
    for batch in batches:
        assert tokens(loads, batch) <= budget or sum(len(piece.indices) for piece in batch) == 1
        for piece in batch:
            assert list(piece.indices) == sorted(piece.indices)
        assert len({piece.pass_index for piece in batch}) == len(batch)


@given(LOADS, st.integers(1, 100))
def test_a_microbatch_is_ordered_by_slot_and_has_one_direction(loads, budget):
    for batch in pack(loads, budget, False):
        slots = [loads[piece.pass_index].slot for piece in batch]
        assert slots == sorted(slots)
        assert len({loads[piece.pass_index].backward for piece in batch}) == 1


@given(LOADS, st.integers(1, 100), st.integers(0, 7))
def test_in_deterministic_mode_a_request_does_not_see_its_neighbours(loads, budget, pick):
    if pick >= len(loads):
        return
    alone = pack([loads[pick]], budget, True)
    shared = pack(loads, budget, True)
    own = [batch for batch in shared if any(piece.pass_index == pick for piece in batch)]
    assert [[piece.indices for piece in batch] for batch in own] == [[p.indices for p in b] for b in alone]
    assert all(len(batch) == 1 for batch in shared)


def test_two_tenants_share_a_microbatch():
    loads = [Load(1, True, [30, 10]), Load(0, True, [20])]
    assert pack(loads, 60, False) == ((Piece(1, (0,)), Piece(0, (0, 1))),)


def test_a_datum_above_the_budget_is_alone():
    batches = pack([Load(0, True, [5, 500, 5])], 100, False)
    assert batches == ((Piece(0, (0, 2)),), (Piece(0, (1,)),))


def test_few_microbatches():
    loads = [Load(slot, True, [64] * 4) for slot in range(8)]
    assert len(pack(loads, 1024, False)) == 2


def test_nothing_gives_nothing():
    assert pack([], 100, False) == ()
