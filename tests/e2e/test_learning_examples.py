"""The examples that learn, short and on a tiny model: each curve goes where examples/README.md says."""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from twinkle_serve.testing.server import RunningServer

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]
EXAMPLES = Path(__file__).parent.parent.parent / "examples"
Run = Callable[..., str]


@pytest.fixture
def run(
    server: RunningServer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    record_property: Callable[[str, object], None],
) -> Run:
    """In this process: each would spend most of its time on importing the SDK anew. The curves are in the
    report (``--junitxml FILE -o junit_family=xunit1``), from where examples/README.md has its figures."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    monkeypatch.setenv("TINKER_TELEMETRY", "0")

    def run(name: str, *options: str) -> str:
        program = importlib.import_module(name)
        where = ["--base-url", server.url, "--output", str(tmp_path / "plots here")]
        program.main([*where, "--model", "llama", *options])
        assert list((tmp_path / "plots here").glob("*.png"))
        said = capsys.readouterr().out
        for line in re.findall(
            r"^.*: .* at first, .* at last$|^loss before any step: .*$", said, re.MULTILINE
        ):
            record_property("curve", line)
        return said

    return run


def curve(said: str, name: str) -> tuple[float, float]:
    """The first and the last fifth of what was drawn."""
    found = re.search(rf"^{re.escape(name)}: (-?[\d.]+) at first, (-?[\d.]+) at last$", said, re.MULTILINE)
    assert found is not None, said
    first, last = found.groups()
    return float(first), float(last)


def test_pretraining_makes_unseen_pages_likelier(run: Run) -> None:
    said = run("pretraining", "--steps", "10", "--learning-rate", "1e-2")
    first, last = curve(said, "unseen loss per token")
    assert last < 0.8 * first
    assert curve(said, "loss per token")[1] < 0.8 * first


def test_agentic_sft_learns_the_assistants_turns(run: Run) -> None:
    said = run("agentic_sft", "--steps", "10", "--learning-rate", "1e-2", "--questions", "1")
    first, last = curve(said, "loss per assistant token")
    assert last < 0.8 * first
    assert re.search(r"right: [01] of 1 new questions", said)


def test_dpo_begins_at_ln_2_and_widens_the_margin(run: Run) -> None:
    said = run("dpo", "--steps", "8", "--learning-rate", "3e-3", "--batch-size", "4")
    assert "loss before any step: 0.693147" in said
    assert curve(said, "loss")[1] < 0.6
    assert curve(said, "margin")[1] > 0.1


def test_an_uploaded_loss_runs_on_the_server_and_falls(run: Run) -> None:
    said = run("uploaded_loss", "--steps", "8", "--learning-rate", "1e-2")
    assert "runs on the server as session-" in said
    first, last = curve(said, "focal loss per token")
    assert last < 0.8 * first


def test_on_policy_distillation_lowers_the_reverse_kl(run: Run) -> None:
    options = ["--steps", "12", "--teacher-steps", "12", "--learning-rate", "1e-2", "--max-tokens", "8"]
    first, last = curve(run("on_policy_distillation", *options), "reverse KL per token")
    assert first > 1
    assert last < 0.5 * first


def test_gkd_lowers_the_forward_kl(run: Run) -> None:
    options = ["--steps", "8", "--teacher-steps", "12", "--learning-rate", "1e-2", "--max-tokens", "8"]
    first, last = curve(run("gkd", *options), "forward KL per token")
    assert first > 0.5
    assert last < 0.5 * first
