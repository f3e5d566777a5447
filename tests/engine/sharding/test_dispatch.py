"""The collectives of a pass on a rank that fails in the middle."""

from __future__ import annotations

import pytest
import torch

from twinkle_serve.engine.sharding.dispatch import PassCollectives
from twinkle_serve.engine.sharding.ranks import Ranks


class Counting(Ranks):
    """Two ranks of which this one is short of memory for its ``failing``-th collective."""

    def __init__(self, failing: int) -> None:
        super().__init__(0, 2)
        self.made: list[str] = []
        self._failing = failing

    def gather_rows(self, rows: torch.Tensor) -> torch.Tensor:
        self._make("gather")
        return torch.cat([rows, rows])

    def reduce_rows(self, rows: torch.Tensor) -> torch.Tensor:
        self._make("reduce")
        return rows[: len(rows) // 2]

    def _make(self, what: str) -> None:
        if len(self.made) == self._failing:
            self._failing = -1
            raise torch.OutOfMemoryError("no memory for it")
        self.made.append(what)


@pytest.mark.parametrize("failing", [0, 1, 2, 3])
def test_what_could_not_be_made_for_lack_of_memory_is_made_at_the_end(failing: int) -> None:
    ranks = Counting(failing + 4)
    collectives = PassCollectives(ranks, torch.device("cpu"))
    rows = torch.ones(3, 2)

    def a_pass() -> None:
        for _ in range(2):
            collectives.reduce(collectives.gather(rows))

    collectives.begin("forward", 3)
    a_pass()
    collectives.keep()
    collectives.begin("forward", 3)
    with pytest.raises(torch.OutOfMemoryError):
        a_pass()
    collectives.complete()
    assert ranks.made == ["gather", "reduce"] * 4
