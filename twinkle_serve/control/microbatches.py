"""Packs the datums of a tick's passes into microbatches under a token budget.

Knows lengths and slots. Does not know what is in a datum.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from twinkle_serve.protocol.work import Piece


@dataclass(frozen=True, slots=True)
class Load:
    """One pass as the packer sees it: where it runs, whether it has a backward, tokens per datum."""

    slot: int
    backward: bool
    lengths: Sequence[int]


@dataclass(frozen=True, slots=True)
class _Datum:
    pass_index: int
    index: int
    length: int


def pack(loads: Sequence[Load], microbatch_tokens: int, deterministic: bool) -> tuple[tuple[Piece, ...], ...]:
    """Every datum of every pass in exactly one microbatch of at most ``microbatch_tokens`` tokens; a datum
    that is larger has one to itself.

    A slot's datums lie together, the short ones first, so that few microbatches touch a slot and each has
    sequences of like length. Passes with and without backward do not mix: the latter would pay for it.
    deterministic: a microbatch never holds two passes, so its shape depends on nobody else.
    """
    groups: dict[tuple[int, ...], list[int]] = defaultdict(list)
    for index, load in enumerate(loads):
        groups[(index,) if deterministic else (load.backward,)].append(index)
    batches = [
        batch
        for _, members in sorted(groups.items())
        for batch in _fill(_datums(loads, members), microbatch_tokens)
    ]
    return tuple(tuple(_pieces(batch)) for batch in batches)


def _datums(loads: Sequence[Load], members: Iterable[int]) -> list[_Datum]:
    datums = [_Datum(p, d, length) for p in members for d, length in enumerate(loads[p].lengths)]
    return sorted(datums, key=lambda d: (loads[d.pass_index].slot, d.length, d.pass_index, d.index))


def _fill(datums: Iterable[_Datum], microbatch_tokens: int) -> Iterator[list[_Datum]]:
    batch: list[_Datum] = []
    num_tokens = 0
    for datum in datums:
        if batch and num_tokens + datum.length > microbatch_tokens:
            yield batch
            batch, num_tokens = [], 0
        batch.append(datum)
        num_tokens += datum.length
    if batch:
        yield batch


def _pieces(batch: Iterable[_Datum]) -> Iterator[Piece]:
    """In the order of the passes' first appearance, which is the order of slots."""
    indices: dict[int, list[int]] = defaultdict(list)
    for datum in batch:
        indices[datum.pass_index].append(datum.index)
    for pass_index, members in indices.items():
        yield Piece(pass_index, tuple(sorted(members)))
