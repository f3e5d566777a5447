"""The losses that can be asked for by name: their per-position inputs, settings and defaults.

The gateway validates by this table and the engine computes by it. Knows no formula and no tensor.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from twinkle_serve.protocol.errors import UserError
from twinkle_serve.protocol.showing import shown

TARGETS = "target_tokens"
UPLOADED = "custom"
"""The loss_fn of a loss that the client made with create_custom_loss."""


@dataclass(frozen=True, slots=True)
class LossSpec:
    """One loss. ``inputs`` must be sent; ``optional`` may be; ``config`` holds settings and defaults.

    ones: an input of this name that is missing counts as 1 everywhere.
    many_targets: target_tokens may be [N, K] rather than [N].
    """

    name: str
    inputs: tuple[str, ...]
    optional: tuple[str, ...] = ()
    config: Mapping[str, float] = field(default_factory=dict)
    ones: str | None = None
    many_targets: bool = False

    @property
    def columns(self) -> tuple[str, ...]:
        """Every column the loss reads; others that a client sends are ignored."""
        return self.inputs + self.optional


_POLICY = (TARGETS, "logprobs", "advantages")
_THRESHOLDS = ("clip_low_threshold", "clip_high_threshold")

LOSSES: Mapping[str, LossSpec] = {
    spec.name: spec
    for spec in (
        LossSpec("cross_entropy", (TARGETS,), ("weights",), ones="weights", many_targets=True),
        LossSpec("importance_sampling", _POLICY),
        LossSpec("ppo", _POLICY, _THRESHOLDS, {"clip_low_threshold": 0.8, "clip_high_threshold": 1.2}),
        LossSpec("cispo", _POLICY, _THRESHOLDS, {"clip_low_threshold": 0.0, "clip_high_threshold": 4.0}),
        LossSpec("dro", _POLICY, (), {"beta": 0.05}),
        LossSpec(
            "gspo",
            _POLICY,
            (*_THRESHOLDS, "sequence_ratio_mask"),
            {"clip_low_threshold": 0.8, "clip_high_threshold": 1.2},
            ones="sequence_ratio_mask",
        ),
    )
}

_NONE: Mapping[str, LossSpec] = {}


def find_loss(name: object, whitelist: Mapping[str, LossSpec] = _NONE) -> LossSpec:
    """The loss of that name, built in or on the operator's whitelist. Raises UserError listing them."""
    if isinstance(name, str) and name in LOSSES:
        return LOSSES[name]
    if isinstance(name, str) and name in whitelist:
        return whitelist[name]
    if name == "stable_reinforce":
        raise UserError(
            "loss_fn 'stable_reinforce' is not served: it has no public formula. "
            "Use importance_sampling, ppo, cispo, dro or gspo instead"
        )
    served = ", ".join([*LOSSES, *whitelist])
    raise UserError(
        f"loss_fn {shown(name)} is not served; served are {served}. Any function of the logprobs can be had "
        "with forward_backward_custom; to have one served by name, give your operator its directory for "
        "`twinkle-serve losses CONFIG add`"
    )


def as_finite(value: object) -> float | None:
    """``value`` if it is a finite number; None if it is none, or too large to be one."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        number = float(value)
    except OverflowError:
        return None
    return number if math.isfinite(number) else None


def complete_config(loss: LossSpec, config: Mapping[str, object]) -> dict[str, float]:
    """``config`` checked and completed with the loss's defaults. Raises UserError naming the key."""
    known = ", ".join(loss.config) or "none"
    values = dict(loss.config)
    for key, value in config.items():
        where = f"loss_fn_config[{key[:64]!r}]"
        if key not in loss.config:
            raise UserError(f"{where} is unknown to {loss.name}; its settings: {known}")
        number = as_finite(value)
        if number is None:
            raise UserError(f"{where} must be a finite number, got {shown(value, 80)}")
        if number < 0:
            raise UserError(f"{where} must be at least 0, got {number}")
        values[key] = number
    low, high = (values.get(key, 0.0) for key in _THRESHOLDS)
    if low > high:
        raise UserError(f"loss_fn_config: clip_low_threshold {low} is above clip_high_threshold {high}")
    return values
