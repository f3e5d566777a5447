"""A place that cannot be is refused where it is made."""

from __future__ import annotations

import subprocess
import sys

import pytest

from twinkle_serve.engine.sharding.place import RankPlace


@pytest.mark.parametrize("rank", [-1, 2])
def test_a_rank_is_one_of_the_group(rank: int) -> None:
    with pytest.raises(ValueError, match="of 2 ranks"):
        RankPlace(rank, 2, "tcp://127.0.0.1:1", 1.0)


def test_an_address_names_its_protocol() -> None:
    with pytest.raises(ValueError, match="tcp://host:port"):
        RankPlace(0, 1, "127.0.0.1:1", 1.0)


def test_whoever_places_ranks_loads_no_torch() -> None:
    code = "import sys, twinkle_serve.engine.sharding.place; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
