"""The reinforcement learning examples, short, on a tiny model, all at once: the mean reward rises clearly."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from twinkle_serve.testing.server import RunningServer

pytestmark = pytest.mark.slow
EXAMPLES = Path(__file__).parent.parent.parent / "examples"
NUM_STEPS = {"grpo.py": 15, "grpo_async.py": 25, "rloo.py": 15}


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("rewards")


@pytest.fixture(scope="module")
def programs(server: RunningServer, directory: Path) -> Iterator[dict[str, subprocess.Popen[bytes]]]:
    """Each in a directory of its own, with what it says in ``said`` there."""
    started = {}
    for program, steps in NUM_STEPS.items():
        options = ["--base-url", server.url, "--model", "llama", "--steps", str(steps), "--max-tokens", "8"]
        options += ["--learning-rate", "1e-2", "--output", "plot here"]
        (directory / program).mkdir()
        with (directory / program / "said").open("wb") as said:
            started[program] = subprocess.Popen(
                [sys.executable, EXAMPLES / program, *options],
                cwd=directory / program,
                env=os.environ | {"TINKER_TELEMETRY": "0"},
                stdout=said,
                stderr=subprocess.STDOUT,
            )
    yield started
    for process in started.values():
        process.kill()
        process.wait()


@pytest.mark.parametrize("program", NUM_STEPS)
def test_the_mean_reward_rises(
    programs: dict[str, subprocess.Popen[bytes]],
    directory: Path,
    record_property: Callable[[str, object], None],
    program: str,
) -> None:
    code = programs[program].wait()
    said = (directory / program / "said").read_text()
    assert code == 0, said[-4000:]
    found = re.search(r"mean reward: ([\d.]+) at first, ([\d.]+) at last", said)
    assert found is not None
    record_property("curve", found[0])
    first, last = map(float, found.groups())
    assert first < 0.15
    assert last > 0.5
    assert (directory / program / "plot here" / "reward.png").read_bytes().startswith(b"\x89PNG")
