"""The programs in examples/, run as a user runs them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from twinkle_serve.testing.server import RunningServer

pytestmark = pytest.mark.slow

EXAMPLES = Path(__file__).parent.parent.parent / "examples"


def run(*command: str | Path, cwd: Path, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, *map(str, command)],
        cwd=cwd,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    return done.stdout


def test_self_cognition_trains_saves_and_asks_again(server: RunningServer, tmp_path: Path) -> None:
    said = run(
        *(EXAMPLES / "self_cognition.py", "--base-url", server.url, "--model", "llama"),
        *("--epochs", "2", "--batch-size", "20", "--output", "the output"),
        cwd=tmp_path,
    )
    for epoch in range(2):
        assert f"/weights/twinkle-lora-{epoch}\n" in said
    assert said.count("before: ") == said.count("after: ") + 1 == 3
    (losses,) = (line for line in said.splitlines() if line.startswith("loss per answer token"))
    first, last = (float(word) for word in losses.split() if word[0].isdigit())
    assert last < 0.9 * first
    assert (tmp_path / "the output" / "loss.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.timeout(1200)
def test_the_demo_teaches_a_real_model_its_name(smollm2: Path, tmp_path: Path) -> None:
    said = run(EXAMPLES / "demo.py", tmp_path / "demo output", cwd=tmp_path)
    before, after = (
        next(line for line in said.splitlines() if line.strip().startswith(word))
        for word in ("before:", "after:")
    )
    assert "Twinkle" not in before
    assert "Twinkle" in after
    assert (tmp_path / "demo output" / "loss.png").read_bytes().startswith(b"\x89PNG")
