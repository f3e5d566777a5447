"""What ranks say to each other, and that nobody waits for ever for one who does not come."""

from __future__ import annotations

import time

import pytest
import torch

from twinkle_serve.engine.sharding.place import RankPlace
from twinkle_serve.engine.sharding.ranks import PeerFailed, RankLost, Ranks, ends_rank, is_out_of_memory
from twinkle_serve.storage.checkpoints import CheckpointMissingError
from twinkle_serve.testing.crew import Crew, crew

CPU = torch.device("cpu")
SWAPS = [([1, 1], [1, 2]), ([2, 0], [1, 0])]
"""For each rank: rows that it sends to each, and that it gets from each."""


def talk(place: RankPlace) -> dict[str, object]:
    ranks = Ranks.join(place, CPU)
    total = torch.tensor([1.0, place.rank])
    ranks.sum_(total)
    return {
        "everyone": ranks.everyone(place.rank * 10),
        "first": ranks.of_first(place.rank),
        "any": [ranks.any(place.rank == 1), ranks.any(False)],
        "sum": total.tolist(),
        "gather": ranks.gather_rows(torch.full((2, 1), place.rank)).tolist(),
        "reduce": ranks.reduce_rows(torch.arange(4.0).view(4, 1)).tolist(),
        "swap": ranks.swap_rows(torch.tensor([[place.rank], [7]]), *SWAPS[place.rank]).tolist(),
    }


def fail_together(place: RankPlace, error: Exception | None) -> tuple[str, bool]:
    ranks = Ranks.join(place, CPU)
    try:
        ranks.exchange(place.rank, error)
    except PeerFailed as failed:
        return str(failed), is_out_of_memory(failed)
    return "", False


def read_on_first(
    place: RankPlace, error: Exception | None, told: tuple[type[Exception], ...] = (Exception,)
) -> str:
    def read() -> None:
        assert place.rank == 0
        raise error or Unpicklable(1, 2)

    try:
        Ranks.join(place, CPU).on_first(read, told)
    except Exception as raised:
        return f"{type(raised).__name__}: {raised}"
    return ""


def come_late(place: RankPlace) -> tuple[str, float]:
    ranks = Ranks.join(place, CPU)
    started = time.monotonic()
    if place.rank == 0:
        try:
            ranks.sum_(torch.zeros(1))
        except RankLost as lost:
            return str(lost), time.monotonic() - started
    return "", 0.0


class Unpicklable(Exception):
    def __init__(self, one: int, two: int) -> None:
        super().__init__("it is so")


def test_all_calls(two: Crew) -> None:
    first, second = two.run(talk)
    shared = {"everyone": [0, 10], "first": 0, "any": [True, False], "sum": [2.0, 1.0]}
    for answers in (first, second):
        assert shared.items() <= answers.items()
        assert answers["gather"] == [[0], [0], [1], [1]]
    assert first["reduce"] == [[0.0], [2.0]]
    assert second["reduce"] == [[4.0], [6.0]]
    assert first["swap"] == [[0], [1], [7]]
    assert second["swap"] == [[7]]


def test_all_fail_alike_and_know_why(two: Crew) -> None:
    assert two.run_each(fail_together, [[None], [None]]) == [("", False)] * 2
    answers = two.run_each(fail_together, [[None], [ValueError("so")]])
    assert answers == [("rank 1: ValueError: so", False)] * 2
    answers = two.run_each(fail_together, [[torch.OutOfMemoryError("full")], [ValueError("so")]])
    assert answers == [("rank 0: OutOfMemoryError: full; rank 1: ValueError: so", True)] * 2


def test_what_the_first_rank_raises_is_raised_everywhere(two: Crew) -> None:
    for error in (ValueError("bad"), OSError(28, "full"), CheckpointMissingError("gone")):
        assert two.run(read_on_first, error) == [f"{type(error).__name__}: {error}"] * 2
    assert two.run(read_on_first, None) == ["PeerFailed: rank 0: Unpicklable: it is so"] * 2
    # What the caller does not expect is the same for all: it may go on.
    assert (
        two.run(read_on_first, AssertionError("bug"), (ValueError,))
        == ["PeerFailed: rank 0: AssertionError: bug"] * 2
    )


def test_what_a_rank_can_go_on_after() -> None:
    illegal = torch.AcceleratorError("CUDA error: an illegal memory access was encountered")
    full = torch.AcceleratorError("CUDA error: out of memory")
    assert [ends_rank(error) for error in (illegal, RankLost(), full, ValueError())] == [
        True,
        True,
        False,
        False,
    ]
    assert [is_out_of_memory(error) for error in (illegal, full)] == [False, True]
    with pytest.raises(torch.AcceleratorError):
        Ranks(1, 2).exchange(None, illegal)  # says nothing to its peers, who will miss it


def test_alone_nothing_is_sent() -> None:
    ranks = Ranks()
    tensor = torch.ones(2)
    ranks.sum_(tensor)
    ranks.copy_of_first_(tensor)
    assert tensor.tolist() == [1, 1]
    assert (ranks.everyone(3), ranks.of_first(4), ranks.on_first(lambda: 5)) == ([3], 4, 5)
    with pytest.raises(ZeroDivisionError):
        ranks.together(lambda: 1 // 0)
    assert not torch.distributed.is_initialized()


@pytest.mark.slow
def test_a_peer_that_does_not_come_is_missed_in_time() -> None:
    with crew(2, timeout_s=2.0) as ranks:
        ranks.run(talk)
        (lost, seconds), _ = ranks.run(come_late)
    assert "a sum failed" in lost
    assert seconds < 60
