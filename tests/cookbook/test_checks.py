"""Each check of the recipes' metrics accepts what is right and refuses what is not."""

from __future__ import annotations

import math
from typing import Any

import pytest

from tests.cookbook import checks
from tests.cookbook.recipes import RECIPES

KL, MIXED = "optim/kl_sample_train_v1", "env/all/by_group/frac_mixed"
FRESH: dict[str, float] = {KL: 1e-8, MIXED: 0.5}


@pytest.mark.parametrize(
    ("check", "right", "wrong"),
    [
        (checks.learns, [{"train_mean_nll": 6.0}, {"train_mean_nll": 3.0}], [{"train_mean_nll": 3.0}] * 2),
        (checks.on_policy, [FRESH] * 2, [FRESH, {KL: 2e-5}]),
        (checks.on_policy, [FRESH], [{KL: math.nan}]),
        (checks.on_policy, [FRESH], [{"another": 0.0}]),
        (checks.trains_on_policy, [FRESH], [FRESH | {MIXED: 0.0}]),
        (checks.earns, [{"reward/total": 0.25}, {"reward/total": 0.0}], [{"reward/total": 0.0}]),
        (
            checks.stale,
            [FRESH | {"sampling_client/step_min": 0}, {KL: 0.1, "sampling_client/step_min": 0}],
            [FRESH | {"sampling_client/step_min": 0}, {KL: 0.0, "sampling_client/step_min": 1}],
        ),
        (
            checks.penalised,
            [FRESH | {"kl_policy_base": 1e-7}, FRESH | {"kl_policy_base": 0.1}],
            [FRESH | {"kl_policy_base": 1e-7}] * 2,
        ),
        (checks.penalised_from_afar, [FRESH | {"kl_policy_base": 4}], [FRESH | {"kl_policy_base": 0.0}]),
        (checks.moved, [FRESH | {"kl_pre_post_v1": 0.01}], [FRESH | {"kl_pre_post_v1": 0.0}]),
        (checks.begins_at_ln_2, [{"dpo_loss": math.log(2)}], [{"dpo_loss": 0.6932}]),
        (checks.own_teacher, [FRESH | {"teacher_kl": 1e-7}], [FRESH | {"teacher_kl": 1e-3}]),
        (
            checks.self_distilled,
            [{"sdft/mean_teacher_entropy": 0.8, "sdft/num_datums": 2}],
            [{"sdft/mean_teacher_entropy": 0.8, "sdft/num_datums": 0}],
        ),
        (
            checks.resumed,
            [{"step": n} for n in (0, 1, 2, 2, 3, 4)],
            [{"step": n} for n in (0, 1, 2, 0, 1, 2, 3, 4)],
        ),
    ],
    ids=lambda each: getattr(each, "__name__", ""),
)
def test_a_check_can_fail(check: checks.Check, right: Any, wrong: Any) -> None:
    assert check(right)
    with pytest.raises(AssertionError):
        check(wrong)


def test_each_recipe_has_a_name_of_its_own() -> None:
    names = [recipe.name for recipe in RECIPES]
    assert len(set(names)) == len(names)
    for recipe in RECIPES:
        assert not any(word.startswith("=") for word in recipe.command)
