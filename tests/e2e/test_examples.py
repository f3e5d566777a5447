"""The programs in examples/, run as a user runs them."""

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


@pytest.mark.timeout(900)
def test_self_cognition_teaches_a_name_that_evaluate_finds(
    server: RunningServer, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    said = run(
        *(EXAMPLES / "self_cognition.py", "--base-url", server.url, "--model", "llama", "--epochs", "6"),
        *("--batch-size", "10", "--learning-rate", "1e-2", "--output", "the output"),
        cwd=tmp_path,
    )
    saved = [line.split()[1] for line in said.splitlines() if line.startswith("saved tinker://")]
    assert [path.rpartition("/")[2] for path in saved] == [f"twinkle-lora-{epoch}" for epoch in range(6)]
    (losses,) = (line for line in said.splitlines() if line.startswith("loss per answer token"))
    first, last = (float(word) for word in losses.split() if word[0].isdigit())
    assert last < 0.5 * first
    before, after = said.partition("Who are you?\n")[2].split("你是谁？")[0].split("  after:")
    assert "Twinkle" not in before
    assert "Twinkle" in after
    assert (tmp_path / "the output" / "loss.png").read_bytes().startswith(b"\x89PNG")
    record_property("curve", losses)
    record_property("scores", _evaluate(server, tmp_path, saved[-1]))


def _evaluate(server: RunningServer, directory: Path, checkpoint: str) -> str:
    """Any evaluation harness would see that: no answer of the base model has the name, most others do."""
    where = ("--base-url", server.url, "--output", "bars")
    said = run(EXAMPLES / "evaluate.py", *where, "--models", "llama", checkpoint, cwd=directory)
    scores = dict(re.findall(r"^(\S+): ([01]\.\d{3})$", said, re.MULTILINE))
    assert float(scores["llama"]) == 0
    assert float(scores[checkpoint]) > 0.5
    assert (directory / "bars" / "evaluation.png").read_bytes().startswith(b"\x89PNG")
    return f"{scores['llama']} before, {scores[checkpoint]} after"


@pytest.mark.timeout(1200)
def test_the_demo_teaches_a_real_model_its_name(smollm2: Path, tmp_path: Path) -> None:
    options = ("--epochs", "1", "--batch-size", "4")
    said = run(EXAMPLES / "demo.py", tmp_path / "demo output", *options, cwd=tmp_path)
    before, after = (
        next(line for line in said.splitlines() if line.strip().startswith(word))
        for word in ("before:", "after:")
    )
    assert "Twinkle" not in before
    assert "Twinkle" in after
    assert (tmp_path / "demo output" / "loss.png").read_bytes().startswith(b"\x89PNG")
