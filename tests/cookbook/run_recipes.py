"""Run tinker-cookbook's recipes, unmodified, against a local server, and check what their own metrics say.

    python -m tests.cookbook.run_recipes [name ...]

Each recipe is a process of its own in a folder that stands for the hub (workspace.py), against one server
with a tiny model under a real model's name. Knows command lines and invariants. `make cookbook` runs it; it
is not among the tests, since the cookbook and what it needs are half a gigabyte.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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
LIMIT_S = 600
Metrics = Sequence[dict[str, float]]


@dataclass(frozen=True)
class Recipe:
    """``check`` raises AssertionError when the metrics, a dict a step, are not what they must be. log: the
    folder they are in, if it is not called after the recipe. prepare: what is done to that folder before."""

    name: str
    module: str
    options: tuple[str, ...]
    check: Callable[[Metrics], None]
    log: str = ""
    prepare: Callable[[Path], None] = lambda folder: None


def values(metrics: Metrics, key: str) -> list[float]:
    found = [step[key] for step in metrics if key in step]
    assert found, f"no step reports {key}; there are {sorted({k for step in metrics for k in step})}"
    return found


def interrupted(folder: Path) -> None:
    """As if the last run had been killed in its third step: what it saved in the end is not on record."""
    record = folder / "checkpoints.jsonl"
    lines = [line for line in record.read_text().splitlines() if json.loads(line)["name"] != "final"]
    assert lines, "there is no earlier checkpoint"
    record.write_text("\n".join([*lines, ""]))


def learns(metrics: Metrics, key: str = "train_mean_nll") -> None:
    """A supervised recipe: the loss is finite and lower in the end."""
    losses = values(metrics, key)
    assert all(map(math.isfinite, losses)), losses
    assert losses[-1] < losses[0], losses


def on_policy(metrics: Metrics) -> None:
    """What was sampled has the logprobs that training finds: to rounding, in float32."""
    for kl in values(metrics, "optim/kl_sample_train_v1"):
        assert abs(kl) < 1e-5, kl


def begins_at_ln_2(metrics: Metrics) -> None:
    losses = values(metrics, "dpo_loss")
    assert abs(losses[0] - math.log(2)) < 1e-6, losses


def own_teacher(metrics: Metrics) -> None:
    """The teacher is the student: at first there is nothing to learn from it."""
    on_policy(metrics[:1])
    assert abs(values(metrics, "teacher_kl")[0]) < 1e-5


def runs(metrics: Metrics) -> None:
    """It has steps to report."""
    assert metrics


def resumed(metrics: Metrics) -> None:
    """The second start went on where the first one ended."""
    steps = values(metrics, "step")
    assert steps == sorted(steps), f"it began again: {steps}"
    assert set(steps) == set(range(5)), steps


def _recipe(
    name: str, module: str, check: Callable[[Metrics], None], options: str, log: str = "", **more: Any
) -> Recipe:
    """``options`` as they are typed; what nearly all of them need goes before, and a later one counts."""
    first = f"log_path=logs/{log or name} model_name={MODEL} behavior_if_log_dir_exists=delete"
    return Recipe(name, module, (*first.split(), *options.split()), check, log, **more)


def _loop(name: str, module: str, check: Callable[[Metrics], None], options: str) -> Recipe:
    """The two recipes without abstractions, which never look at what is in their folder."""
    return Recipe(
        name,
        module,
        (f"log_path=logs/{name.replace(' ', '_')}", f"model_name={MODEL}", *options.split()),
        check,
    )


def _math(name: str, check: Callable[[Metrics], None], options: str = "") -> Recipe:
    short = "env=arithmetic group_size=4 groups_per_batch=2 max_tokens=5 max_steps=2 lora_rank=8"
    return _recipe(
        name, "math_rl.train", check, f"{short} loss_fn=importance_sampling learning_rate=1e-4 {options}"
    )


_CHAT = (
    "dataset=no_robots eval_every=0 infrequent_eval_every=0 batch_size=8 lora_rank=8 learning_rate=1e-2 "
    "save_every=2 rolling_save_every=1"
)
_TINY = "lora_rank=8 max_tokens=8 max_steps=2 eval_every=0"
_RENDERER = "renderer_name=qwen3_instruct"

RECIPES = (
    _loop(
        "sl_loop", "sl_loop", learns, "max_steps=4 batch_size=8 lora_rank=8 learning_rate=1e-2 save_every=2"
    ),
    *(
        _loop(
            f"rl_loop {loss}",
            "rl_loop",
            runs,
            f"loss_fn={loss} group_size=4 max_tokens=8 max_steps=2 lora_rank=8 batch_size=2 save_every=1",
        )
        for loss in ("importance_sampling", "cispo", "gspo")
    ),
    _recipe("chat_sl", "chat_sl.train", learns, f"{_CHAT} max_steps=3"),
    _recipe(
        "chat_sl resumed",
        "chat_sl.train",
        resumed,
        f"{_CHAT} max_steps=5 behavior_if_log_dir_exists=resume",
        log="chat_sl",
        prepare=interrupted,
    ),
    _math("math_rl", on_policy),
    _math("math_rl_kl", on_policy, "compute_post_kl=True"),
    _math("math_rl_ppo", on_policy, "loss_fn=ppo"),
    _math("math_rl_gsm8k", on_policy, "env=gsm8k max_tokens=8"),
    _math("math_rl_async", runs, "max_steps_off_policy=1"),
    _math(
        "math_rl_stream",
        on_policy,
        "stream_minibatch_config.num_minibatches=2 stream_minibatch_config.groups_per_batch=2",
    ),
    _recipe(
        "dpo",
        "preference.dpo.train",
        begins_at_ln_2,
        "dataset=hhh batch_size=8 max_steps=2 learning_rate=1e-3",
    ),
    Recipe(
        "rlhf",
        "preference.rlhf.rlhf_pipeline",
        tuple(
            f"base_model={MODEL} short_name=tiny lora_rank=8 batch_size=4 rl_max_tokens=8 rl_group_size=2 "
            "max_steps=2 save_every=1 eval_every=0 num_groups_to_log=0".split()
        ),
        on_policy,
        log="rlhf-tiny/rl",
    ),
    _recipe(
        "on_policy_distillation",
        "distillation.on_policy_distillation",
        own_teacher,
        f"teacher_model={MODEL} dataset=deepmath group_size=2 groups_per_batch=2 {_TINY}",
    ),
    _recipe(
        "off_policy_distillation",
        "distillation.off_policy_reasoning",
        learns,
        f"{_RENDERER} lora_rank=8 max_steps=2 batch_size=8 learning_rate=1e-2 buffer_size=16 max_prompts=32 "
        "eval_every=0",
    ),
    _recipe("sdft", "sdft.train", runs, f"groups_per_batch=2 topk=4 {_TINY}"),
    _recipe(
        "prompt_distillation",
        "prompt_distillation.train",
        learns,
        f"file_path=distilled.jsonl {_RENDERER} lora_rank=8 num_epochs=1 batch_size=8 learning_rate=1e-2 "
        "eval_every=0",
    ),
    _recipe(
        "guess_number",
        "multiplayer_rl.guess_number.train",
        on_policy,
        f"{_RENDERER} group_size=2 batch_size=2 max_tokens=8 max_steps=2 eval_every=0",
    ),
    _recipe(
        "rubric",
        "rubric.train",
        on_policy,
        f"{_RENDERER} grader_llm_name={MODEL} grader_renderer_name=qwen3_instruct train_group_size=2 "
        "groups_per_batch=2 train_jsonl_path=rubric_train.jsonl test_jsonl_path=rubric_test.jsonl "
        f"loss_fn=importance_sampling {_TINY}",
    ),
)


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


def last_of_each(options: Sequence[str]) -> list[str]:
    """A later option takes the place of an earlier one of the same name."""
    return [f"{key}={value}" for key, value in dict(each.split("=", 1) for each in options).items()]


def run(recipe: Recipe, python: Path, server: RunningServer, workspace: Path) -> None:
    """Raises AssertionError saying what is wrong."""
    environment = os.environ | {
        "TINKER_BASE_URL": server.url,
        "TINKER_API_KEY": "tml-cookbook",
        "TINKER_TELEMETRY": "0",
        "TINKER_COOKBOOK_RUNS_DIR": str(workspace / "logs"),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
    }
    module = f"tinker_cookbook.recipes.{recipe.module}"
    folder = workspace / "logs" / (recipe.log or recipe.name.replace(" ", "_"))
    recipe.prepare(folder)
    output = workspace / f"{recipe.name.replace(' ', '_')}.out"
    with output.open("w") as file:
        done = subprocess.run(
            [str(python), "-m", module, *last_of_each(recipe.options)],
            cwd=workspace,
            env=environment,
            stdout=file,
            stderr=subprocess.STDOUT,
            timeout=LIMIT_S,
            check=False,
        )
    assert done.returncode == 0, f"exit code {done.returncode}\n{output.read_text()[-3000:]}"
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    recipe.check([json.loads(line) for line in lines])


def main(names: Sequence[str]) -> int:
    root = Path(os.environ.get("TWINKLE_MODELS", "models"))
    model = build_tiny_qwen3_moe(root)
    python = cookbook(root)
    failed = []
    with tempfile.TemporaryDirectory(prefix="cookbook ") as temporary:
        workspace = make_workspace(Path(temporary) / "hub", model)
        config = Path(temporary) / "config.json"
        served = {"name": MODEL, "path": str(model), "device": "cpu", "num_threads": 1, "dtype": "float32"}
        config.write_text(
            json.dumps({"models": [served], "storage": {"root": str(Path(temporary) / "store")}})
        )
        with running_server(config, log=Path(temporary) / "server.log") as server:
            for recipe in RECIPES:
                if names and recipe.name not in names:
                    continue
                started = time.monotonic()
                try:
                    run(recipe, python, server, workspace)
                    verdict = "fine"
                except (AssertionError, subprocess.TimeoutExpired, OSError) as error:
                    failed.append(recipe.name)
                    verdict = f"FAILED: {error}"
                print(f"{recipe.name:24} {time.monotonic() - started:6.1f} s  {verdict}", flush=True)
    print(f"{len(failed)} failed" + (f": {', '.join(failed)}" if failed else ""))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
