"""The reinforcement learning examples, short and on a tiny model: the mean reward rises clearly."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from twinkle_serve.testing.server import RunningServer

pytestmark = pytest.mark.slow
EXAMPLES = Path(__file__).parent.parent.parent / "examples"


@pytest.mark.parametrize(("program", "steps"), [("grpo.py", 15), ("grpo_async.py", 25), ("rloo.py", 15)])
def test_the_mean_reward_rises(
    server: RunningServer,
    tmp_path: Path,
    record_property: Callable[[str, object], None],
    program: str,
    steps: int,
) -> None:
    options = ["--base-url", server.url, "--model", "llama", "--steps", str(steps), "--max-tokens", "8"]
    done = subprocess.run(
        [sys.executable, EXAMPLES / program, *options, "--learning-rate", "1e-2", "--output", "plot here"],
        cwd=tmp_path,
        env=os.environ | {"TINKER_TELEMETRY": "0"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    found = re.search(r"mean reward: ([\d.]+) at first, ([\d.]+) at last", done.stdout)
    assert found is not None
    record_property("curve", found[0])
    first, last = map(float, found.groups())
    assert first < 0.15
    assert last > 0.5
    assert (tmp_path / "plot here" / "reward.png").read_bytes().startswith(b"\x89PNG")
