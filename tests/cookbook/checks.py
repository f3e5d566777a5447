"""What the recipes' own metrics must say. Each check takes a dict a step, raises AssertionError if they say
something else, and returns in a few words what it saw.

Knows names of metrics. Does not know which recipe is checked by what (recipes.py).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

Metrics = Sequence[dict[str, float]]
Check = Callable[[Metrics], str]
ROUNDING = 1e-5
"""Of a mean logprob in float32."""


def values(metrics: Metrics, key: str) -> list[float]:
    found = [step[key] for step in metrics if key in step]
    assert found, f"no step reports {key}; there are {sorted({k for step in metrics for k in step})}"
    assert all(map(math.isfinite, found)), f"{key}: {found}"
    return found


def learns(metrics: Metrics, key: str = "train_mean_nll") -> str:
    """A supervised recipe: the loss is lower in the end."""
    losses = values(metrics, key)
    assert losses[-1] < losses[0], losses
    return f"{key} {losses[0]:.3f} to {losses[-1]:.3f}"


def on_policy(metrics: Metrics) -> str:
    """What was sampled has the logprobs that training finds, at every step."""
    kls = values(metrics, "optim/kl_sample_train_v1")
    for kl in kls:
        assert abs(kl) < ROUNDING, kls
    return f"|kl_sample_train_v1| <= {max(map(abs, kls)):.1e} in {len(kls)} steps"


def rewarded(metrics: Metrics) -> str:
    """Some group's answers did not all earn the same: there was something to learn."""
    mixed = values(metrics, "env/all/by_group/frac_mixed")
    assert max(mixed) > 0, "all advantages were 0"
    return f"rewards differ in {max(mixed):.0%} of groups"


def trains_on_policy(metrics: Metrics) -> str:
    return f"{on_policy(metrics)}, {rewarded(metrics)}"


def stale(metrics: Metrics) -> str:
    """Sampling runs ahead of training, so only the first step's answers are fresh."""
    kls = values(metrics, "optim/kl_sample_train_v1")
    assert abs(kls[0]) < ROUNDING, kls
    steps = values(metrics, "sampling_client/step_min")
    assert steps[-1] < len(steps) - 1, f"nothing was stale: {steps}"
    return f"kl_sample_train_v1 {kls[0]:.1e} at first, {kls[-1]:.1e} at last, {rewarded(metrics)}"


def earns(metrics: Metrics) -> str:
    """rl_loop reports no more than rewards, and what the optimizer says of the steps that it made."""
    rewards = values(metrics, "reward/total")
    assert any(0 < reward < 1 for reward in rewards), f"every step was skipped: {rewards}"
    return f"mean rewards {', '.join(f'{reward:.2f}' for reward in rewards)}"


def penalised(metrics: Metrics) -> str:
    """The policy begins at its reference and leaves it."""
    kls = values(metrics, "kl_policy_base")
    assert abs(kls[0]) < ROUNDING, kls
    assert abs(kls[-1]) > 100 * ROUNDING, kls
    return f"kl_policy_base {kls[0]:.1e} at first, {kls[-1]:.1e} at last, {trains_on_policy(metrics)}"


def penalised_from_afar(metrics: Metrics) -> str:
    """The policy begins elsewhere than its reference."""
    kls = values(metrics, "kl_policy_base")
    assert kls[0] > 0.1, kls
    return f"kl_policy_base {kls[0]:.2f} at first, {trains_on_policy(metrics)}"


def moved(metrics: Metrics) -> str:
    """As seen by the weights after the step."""
    kls = values(metrics, "kl_pre_post_v1")
    assert max(map(abs, kls)) > ROUNDING, kls
    return f"kl_pre_post_v1 up to {max(kls, key=abs):.1e}, {trains_on_policy(metrics)}"


def begins_at_ln_2(metrics: Metrics) -> str:
    losses = values(metrics, "dpo_loss")
    assert abs(losses[0] - math.log(2)) < 1e-6, losses
    return f"dpo_loss {losses[0]:.7f} at first"


def own_teacher(metrics: Metrics) -> str:
    """The teacher is the student: at first there is nothing to learn from it."""
    kls = values(metrics, "teacher_kl")
    assert abs(kls[0]) < ROUNDING, kls
    return f"teacher_kl {kls[0]:.1e} at first, {on_policy(metrics)}"


def self_distilled(metrics: Metrics) -> str:
    """sdft: the teacher is the student with an example before its eyes, so they disagree a little."""
    entropies = values(metrics, "sdft/mean_teacher_entropy")
    assert all(0 < entropy < 20 for entropy in entropies), entropies
    assert all(value > 0 for value in values(metrics, "sdft/num_datums"))
    return f"teacher's entropy {entropies[0]:.3f}"


def resumed(metrics: Metrics) -> str:
    """The second start went on where the first one ended."""
    steps = values(metrics, "step")
    assert steps == sorted(steps), f"it began again: {steps}"
    assert set(steps) == set(range(5)), steps
    return f"steps {', '.join(f'{step:.0f}' for step in steps)}"
