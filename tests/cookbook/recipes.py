"""The recipes: the command line of each, short, and what its metrics must say.

Knows the cookbook's options. Does not know how they are run (run_recipes.py).
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tests.cookbook.checks import (
    Check,
    begins_at_ln_2,
    earns,
    learns,
    moved,
    on_policy,
    own_teacher,
    penalised,
    penalised_from_afar,
    resumed,
    self_distilled,
    stale,
    trains_on_policy,
)
from tests.cookbook.workspace import MODEL

TAUGHT = "TAUGHT"
"""Stands in a command line for the checkpoint that taught.py made."""


@dataclass(frozen=True)
class Recipe:
    """command: what follows ``python``. log: where its metrics are, below logs/. prepare: is given that
    folder and the taught checkpoint before it starts."""

    name: str
    command: tuple[str, ...]
    check: Check
    log: str
    prepare: Callable[[Path, str], None] = lambda folder, taught: None


def interrupted(folder: Path, taught: str) -> None:
    """As if the last run had been killed in its third step: what it saved in the end is not on record."""
    record = folder / "checkpoints.jsonl"
    lines = [line for line in record.read_text().splitlines() if json.loads(line)["name"] != "final"]
    assert lines, "there is no earlier checkpoint"
    record.write_text("\n".join([*lines, ""]))


def begun(folder: Path, taught: str) -> None:
    """As if an earlier run had left the taught weights: rl_loop has no option for where to start from."""
    folder.mkdir(parents=True)
    record = {"name": "000000", "batch": 0, "state_path": taught}
    (folder / "checkpoints.jsonl").write_text(json.dumps(record) + "\n")


def _command(module: str, *options: str) -> tuple[str, ...]:
    """``options`` as they are typed. A later option takes the place of an earlier one of the same name."""
    given = dict(word.split("=", 1) for text in options for word in text.split())
    return ("-m", f"tinker_cookbook.recipes.{module}", *(f"{key}={value}" for key, value in given.items()))


def _recipe(
    name: str, module: str, check: Check, options: str, log: str = "", **more: Callable[..., None]
) -> Recipe:
    log = log or name
    common = f"log_path=logs/{log} model_name={MODEL} behavior_if_log_dir_exists=delete"
    return Recipe(name, _command(module, common, options), check, log, **more)


def _loop(name: str, module: str, check: Check, options: str, **more: Callable[..., None]) -> Recipe:
    """The two recipes without abstractions, which never look at what is in their folder."""
    return Recipe(
        name, _command(module, f"log_path=logs/{name} model_name={MODEL}", options), check, name, **more
    )


def _math(name: str, check: Check, options: str = "") -> Recipe:
    short = "env=arithmetic group_size=8 groups_per_batch=2 max_tokens=5 max_steps=3 lora_rank=8 eval_every=0"
    rest = f"loss_fn=importance_sampling learning_rate=1e-3 load_checkpoint_path={TAUGHT}"
    return _recipe(name, "math_rl.train", check, f"{short} {rest} {options}")


def _with_penalty(name: str, check: Check, *checkpoints: str) -> Recipe:
    """math_rl with a KL penalty: see math_rl_kl.py."""
    program = str(Path(__file__).parent / "math_rl_kl.py")
    return Recipe(name, (program, MODEL, f"logs/{name}", *checkpoints), check, name)


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
            f"rl_loop_{loss}",
            "rl_loop",
            earns,
            f"loss_fn={loss} group_size=8 max_tokens=16 max_steps=2 batch_size=2 learning_rate=1e-3 "
            "save_every=1",
            prepare=begun,
        )
        for loss in ("importance_sampling", "cispo", "gspo")
    ),
    _recipe("chat_sl", "chat_sl.train", learns, f"{_CHAT} max_steps=3"),
    _recipe(
        "chat_sl_resumed",
        "chat_sl.train",
        resumed,
        f"{_CHAT} max_steps=5 behavior_if_log_dir_exists=resume",
        log="chat_sl",
        prepare=interrupted,
    ),
    _math("math_rl", trains_on_policy),
    _math("math_rl_post_kl", moved, "compute_post_kl=True"),
    _math("math_rl_ppo", trains_on_policy, "loss_fn=ppo"),
    _math("math_rl_gsm8k", trains_on_policy, "env=gsm8k max_tokens=16"),
    _math("math_rl_async", stale, "max_steps_off_policy=1 max_steps=4"),
    _math(
        "math_rl_stream",
        trains_on_policy,
        "stream_minibatch_config.num_minibatches=2 stream_minibatch_config.groups_per_batch=2",
    ),
    _with_penalty("math_rl_kl", penalised, TAUGHT, TAUGHT),
    _with_penalty("math_rl_kl_base", penalised_from_afar, TAUGHT),
    _recipe(
        "dpo",
        "preference.dpo.train",
        begins_at_ln_2,
        "dataset=hhh batch_size=8 max_steps=2 learning_rate=1e-3",
    ),
    Recipe(
        "rlhf",
        _command(
            "preference.rlhf.rlhf_pipeline",
            f"base_model={MODEL} short_name=tiny lora_rank=8 batch_size=4 rl_max_tokens=8 rl_group_size=2 "
            "max_steps=2 save_every=1 eval_every=0 num_groups_to_log=0",
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
    _recipe("sdft", "sdft.train", self_distilled, f"groups_per_batch=2 topk=4 {_TINY}"),
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
)  # fmt: skip
