"""From pieces of passes to packed rows, segments and loss rows."""

from __future__ import annotations

import itertools

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from twinkle_serve.engine.layout import AdapterLayout, Target
from twinkle_serve.engine.packing import LossRows, PackedRows, concatenate, make_segments
from twinkle_serve.engine.slots import Adapter, Segment
from twinkle_serve.protocol.data import Column, DatumBatch, LoraSpec

LAYOUT = AdapterLayout.build([Target("linear", "q_proj", "attn", 2, 2)])


def adapter(**flags: bool) -> Adapter:
    return Adapter(LAYOUT, LoraSpec(1, **flags), torch.zeros(1, LAYOUT.row_size))


def test_neighbours_of_one_adapter_are_one_segment() -> None:
    one, two = adapter(), adapter()
    found = make_segments([(one, 3), (one, 2), (two, 1), (one, 4)])
    assert found["attn"] == [Segment(one, 0, 5), Segment(two, 5, 6), Segment(one, 6, 10)]
    assert found["mlp"] == found["unembed"] == found["attn"]


def test_rows_without_adapter_or_group_have_no_segment() -> None:
    attention_only = adapter(train_mlp=False, train_unembed=False)
    found = make_segments([(None, 2), (attention_only, 3), (None, 1), (attention_only, 1)])
    assert found["attn"] == [Segment(attention_only, 2, 5), Segment(attention_only, 6, 7)]
    assert found["mlp"] == found["unembed"] == []


@given(st.lists(st.tuples(st.sampled_from([None, 0, 1, 2]), st.integers(1, 5)), max_size=8))
def test_segments_own_exactly_their_rows(stretches: list[tuple[int | None, int]]) -> None:
    owners = [adapter(), adapter(train_mlp=False), adapter(train_attn=False)]
    rows = [owner for owner, count in stretches for _ in range(count)]
    found = make_segments((None if o is None else owners[o], n) for o, n in stretches)
    for group, untrained in (("attn", 2), ("mlp", 1), ("unembed", None)):
        segments = found[group]  # type: ignore[index]
        by_row = [None] * len(rows)
        for owner, start, end in segments:
            assert start < end
            for row in range(start, end):
                assert by_row[row] is None
                by_row[row] = owner
        expected = [None if o is None or o == untrained else owners[o] for o in rows]
        assert by_row == expected
        assert all(a.end <= b.start for a, b in itertools.pairwise(segments))


def batch(lengths: list[int], k: int = 0) -> DatumBatch:
    size = sum(lengths) * max(1, k)
    widths = np.full(len(lengths), k, np.int32)
    return DatumBatch(
        np.arange(sum(lengths), dtype=np.int32),
        np.array(lengths),
        {
            "target_tokens": Column(np.arange(100, 100 + size), widths),
            "weights": Column(np.arange(size, dtype=np.float32), widths),
        },
    )


def test_packed_positions_restart_with_every_sequence() -> None:
    tokens, lengths = concatenate([batch([2, 1]), batch([3])])
    packed = PackedRows.of(tokens, lengths, torch.device("cpu"))
    assert packed.token_ids.tolist() == [0, 1, 2, 0, 1, 2]
    assert packed.token_ids.dtype == packed.position_ids.dtype == torch.int64
    assert packed.position_ids.tolist() == [0, 1, 0, 0, 1, 2]
    assert packed.lengths == [2, 1, 3]


def test_loss_rows_of_one_target_a_position() -> None:
    rows = LossRows.of(batch([2, 3]), 10)
    assert rows.rows.tolist() == [10, 11, 12, 13, 14]
    assert rows.targets.tolist() == [100, 101, 102, 103, 104]
    assert rows.lengths.tolist() == [2, 3]
    assert list(rows.inputs) == ["weights"]
    assert rows.inputs["weights"].tolist() == [0, 1, 2, 3, 4]


def test_loss_rows_of_many_targets_a_position() -> None:
    rows = LossRows.of(batch([1, 2], k=3), 4)
    assert rows.rows.tolist() == [4, 4, 4, 5, 5, 5, 6, 6, 6]
    assert rows.lengths.tolist() == [3, 6]


def test_loss_rows_may_mix_widths() -> None:
    one, many = batch([2]), batch([2], k=2)
    mixed = DatumBatch(
        np.zeros(4, np.int32),
        np.array([2, 2]),
        {
            "target_tokens": Column(
                np.concatenate([one.columns["target_tokens"].values, many.columns["target_tokens"].values]),
                np.array([0, 2], np.int32),
            )
        },
    )
    rows = LossRows.of(mixed, 0)
    assert rows.rows.tolist() == [0, 1, 2, 2, 3, 3]
    assert rows.lengths.tolist() == [2, 4]


def test_loss_rows_can_be_given_to_torch() -> None:
    """Unpacked batches are read-only views; torch refuses (warns about) those."""
    rows = LossRows.of(DatumBatch.unpack(batch([2]).pack()), 0)
    torch.from_numpy(rows.targets)
    torch.from_numpy(rows.inputs["weights"])
