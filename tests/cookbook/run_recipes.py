"""Run tinker-cookbook's recipes, unmodified, against a local server, and check what their own metrics say.

    python -m tests.cookbook.run_recipes [name ...]

Each recipe is a process of its own in a folder that stands for the hub (workspace.py), against one server
with a tiny model under a real model's name. Knows processes. Does not know what a recipe is asked and what it
must say (recipes.py, checks.py). `make cookbook` runs it; it is not among the tests, since the cookbook and
what it needs are half a gigabyte.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from tests.cookbook.recipes import RECIPES, TAUGHT, Recipe
from tests.cookbook.workspace import MODEL, make_workspace
from twinkle_serve.testing.cache import build_once
from twinkle_serve.testing.models import build_tiny_qwen3_moe
from twinkle_serve.testing.server import RunningServer, running_server

COOKBOOK = "0.6.1"
# What it imports besides what is here already. Of its own list tml-renderers is left out: PyPI has none.
NEEDS = [
    *("tinker==0.38.0", "datasets>=2.14", "blobfile>=3", "chz>=0.4", "cloudpickle>=3", "pyrage>=1.4"),
    *("termcolor>=2", "tiktoken>=0.12", "rich>=13", "sympy>=1.12", "pylatexenc>=2", "math-verify>=0.5"),
]
# Much less on a quiet machine: a recipe takes 5 to 35 s there.
LIMIT_S, READY_S = 1800, 600


def cookbook(root: Path) -> Path:
    """The Python of an environment with the cookbook; what is here already it shares."""

    def install(directory: Path) -> None:
        subprocess.run([sys.executable, "-m", "venv", str(directory)], check=True)
        packages = next(directory.glob("lib/python3*/site-packages"))
        own = next(Path(sys.prefix).glob("lib/python3*/site-packages"))
        (packages / "shared.pth").write_text(f"{own}\n")
        pip = [directory / "bin" / "python", "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        subprocess.run([*pip, "--no-deps", f"tinker-cookbook=={COOKBOOK}"], check=True)
        subprocess.run([*pip, *NEEDS], check=True)

    return build_once(root, f"cookbook-{COOKBOOK}", install) / "bin" / "python"


def environment_of(server: RunningServer, workspace: Path) -> dict[str, str]:
    return os.environ | {
        "TINKER_BASE_URL": server.url,
        "TINKER_API_KEY": "tml-cookbook",
        "TINKER_TELEMETRY": "0",
        "TINKER_COOKBOOK_RUNS_DIR": str(workspace / "logs"),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
    }


def teach(python: Path, server: RunningServer, workspace: Path) -> str:
    """The path of a checkpoint whose answers are worth something now and then. Raises AssertionError."""
    done = subprocess.run(
        [str(python), str(Path(__file__).parent / "taught.py"), server.url, MODEL],
        cwd=workspace,
        env=environment_of(server, workspace),
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.split()[-1]


def run(recipe: Recipe, python: Path, server: RunningServer, workspace: Path, taught: str) -> str:
    """What its check saw. Raises AssertionError saying what is wrong."""
    folder = workspace / "logs" / recipe.log
    recipe.prepare(folder, taught)
    output = workspace / f"{recipe.name}.out"
    with output.open("w") as file:
        done = subprocess.run(
            [str(python), *(word.replace(TAUGHT, taught) for word in recipe.command)],
            cwd=workspace,
            env=environment_of(server, workspace),
            stdout=file,
            stderr=subprocess.STDOUT,
            timeout=LIMIT_S,
            check=False,
        )
    assert done.returncode == 0, f"exit code {done.returncode}\n{output.read_text()[-3000:]}"
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return recipe.check([json.loads(line) for line in lines])


def run_all(recipes: Sequence[Recipe], python: Path, server: RunningServer, workspace: Path) -> list[str]:
    """The names of those that failed; a line for each as soon as it has ended."""
    failed = []
    taught = teach(python, server, workspace)
    for recipe in recipes:
        started = time.monotonic()
        try:
            verdict = f"fine: {run(recipe, python, server, workspace, taught)}"
        except (AssertionError, subprocess.TimeoutExpired, OSError) as error:
            failed.append(recipe.name)
            verdict = f"FAILED: {error}"
        print(f"{recipe.name:24} {time.monotonic() - started:6.1f} s  {verdict}", flush=True)
    return failed


def main(names: Sequence[str]) -> int:
    unknown = set(names) - {recipe.name for recipe in RECIPES}
    if unknown:
        print(f"no such recipe: {', '.join(sorted(unknown))}")
        return 2
    root = Path(os.environ.get("TWINKLE_MODELS", "models"))
    model = build_tiny_qwen3_moe(root)
    python = cookbook(root)
    chosen = [recipe for recipe in RECIPES if not names or recipe.name in names]
    with tempfile.TemporaryDirectory(prefix="cookbook ") as temporary:
        workspace = make_workspace(Path(temporary) / "hub", model)
        config = Path(temporary) / "config.json"
        served = {"name": MODEL, "path": str(model), "device": "cpu", "num_threads": 1, "dtype": "float32"}
        config.write_text(
            json.dumps({"models": [served], "storage": {"root": str(Path(temporary) / "store")}})
        )
        with running_server(config, log=Path(temporary) / "server.log", ready_s=READY_S) as server:
            failed = run_all(chosen, python, server, workspace)
    print(
        f"{len(chosen) - len(failed)} fine, {len(failed)} failed{': ' if failed else ''}{', '.join(failed)}"
    )
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
