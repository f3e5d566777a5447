"""Every file that we ship for operators, read by those who will read it."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from ray.serve.schema import ServeDeploySchema

from twinkle_serve.cli import main
from twinkle_serve.config import load_config
from twinkle_serve.plan import budget_of, find_shapes, report
from twinkle_serve.testing.models import build_tiny_qwen3_moe

DEPLOYMENTS = Path(__file__).parents[1] / "deployments"
SERVED = sorted(path.name for path in DEPLOYMENTS.glob("*.yaml"))
GPU = sorted(name for name in SERVED if name.startswith("qwen3-"))


def _words(text: str) -> list[str]:
    return [" ".join(line.lstrip("# ").split()) for line in text.splitlines()]


def test_the_files_that_were_promised_are_there() -> None:
    assert {"local.yaml", "local-2rank.yaml"} < set(SERVED)
    assert GPU == ["qwen3-235b-a22b.yaml", "qwen3-30b-a3b-1gpu.yaml", "qwen3-30b-a3b.yaml"]


@pytest.mark.parametrize("name", SERVED)
def test_serve_deploy_and_check_config_accept_it(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    ServeDeploySchema.model_validate(yaml.safe_load((DEPLOYMENTS / name).read_text()))
    assert main(["check-config", str(DEPLOYMENTS / name)]) == 0
    assert ": fine; serves " in capsys.readouterr().out


@pytest.mark.parametrize("name", GPU)
def test_it_fits_and_its_comments_say_how(name: str) -> None:
    path = DEPLOYMENTS / name
    (model,) = load_config(path).models
    budget = budget_of(model, find_shapes(model.path))
    assert budget.limit is not None
    assert budget.fits
    comments = _words(path.read_text())
    shown = report(budget).split("GiB of host memory", maxsplit=1)[0].splitlines()[3:]
    assert len(shown) >= 20
    for line in shown:
        assert " ".join(line.split()) in comments, line


def test_two_nodes_of_eight_carry_the_large_model() -> None:
    (model,) = load_config(DEPLOYMENTS / "qwen3-235b-a22b.yaml").models
    assert model.ranks == 16


def test_the_small_mixture_of_two_ranks_is_the_one_that_the_builder_makes(models_root: Path) -> None:
    (model,) = load_config(DEPLOYMENTS / "local-2rank.yaml").models
    assert model.ranks == 2
    assert Path(model.path).name == build_tiny_qwen3_moe(models_root).name


# the command --------------------------------------------------------------------------------------------


def test_plan_shows_every_line_and_that_it_fits(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(DEPLOYMENTS / "qwen3-30b-a3b.yaml")]) == 0
    lines = _words(capsys.readouterr().out)
    assert lines[0] == "Qwen/Qwen3-30B-A3B: 30,532,122,624 parameters, 8 ranks (expert_parallel)"
    assert "6.75 base experts 48 x 16 experts x 3 x 2,048 x 768 x 2 B" in lines
    assert any(line.startswith("Qwen/Qwen3-30B-A3B: fits; ") for line in lines)


def test_plan_refuses_what_cannot_fit_and_says_what_is_too_large(capsys: pytest.CaptureFixture[str]) -> None:
    too_many = ["--set", "models.0.max_resident_adapters=64"]
    assert main(["plan", str(DEPLOYMENTS / "qwen3-30b-a3b.yaml"), *too_many]) == 1
    complaint = capsys.readouterr().err
    assert "Qwen/Qwen3-30B-A3B: does not fit; " in complaint
    assert "GiB a rank, " in complaint
    assert "(most of it: gradients 46.60, adam 46.60," in complaint


def test_plan_says_which_model_it_does_not_know(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--set", f"models.0.path={tmp_path}"]
    assert main(["plan", str(DEPLOYMENTS / "local.yaml"), *arguments]) == 1
    assert f"{tmp_path}/config.json: " in capsys.readouterr().err


def test_plan_does_not_need_torch() -> None:
    import subprocess
    import sys

    program = (
        "import sys; from twinkle_serve.cli import main; code = main(sys.argv[1:]); "
        "assert 'torch' not in sys.modules and 'ray' not in sys.modules; sys.exit(code)"
    )
    command = [sys.executable, "-c", program, "plan", str(DEPLOYMENTS / "qwen3-30b-a3b.yaml")]
    assert subprocess.run(command, stdout=subprocess.DEVNULL, check=False).returncode == 0
