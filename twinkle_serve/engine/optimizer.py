"""AdamW on whole adapter blocks, in place: torch's fused kernel, global-norm clipping, many blocks at once.

Equals ``clip_grad_norm_`` followed by ``torch.optim.AdamW``. Knows slots as blocks of floats and moments.
Does not know runs or which factors a block holds: what is zero with a zero gradient stays zero.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch.optim.adamw import adamw

from twinkle_serve.engine.sharding.shares import Shares
from twinkle_serve.engine.slots import SlotPool
from twinkle_serve.faults import reach
from twinkle_serve.protocol.data import AdamParams
from twinkle_serve.protocol.errors import UserError

_CLIP_EPS = 1e-6
"""What ``torch.nn.utils.clip_grad_norm_`` adds to the norm that it divides by."""

_SMALLEST_EPS = float(torch.finfo(torch.float32).tiny)
"""An eps that float32 cannot hold would be 0, and 0 / 0 would put NaN where no gradient ever came."""

_NORM_CHUNK = 4096

_NOT_FINITE = "the accumulated gradients are not finite; the step was not taken and they were discarded"


class NonFiniteGradientError(UserError):
    """A step was refused because the gradients are not finite, or too large for Adam's squares in float32."""


class SlotStep(NamedTuple):
    """A step that is due for the run in ``slot``."""

    pool: SlotPool
    slot: int
    params: AdamParams


def adamw_step(
    steps: Sequence[SlotStep], shares: Shares | None = None
) -> list[dict[str, float] | NonFiniteGradientError]:
    """Step distinct slots; the outcomes are those of ``adamw_steps``. The slots' counts of steps follow, and
    no slot has gradients afterwards.

    shares: how the slots' columns lie on several ranks, all of which call this with the same steps. The
    parts of a gradient are summed here, once for each step and not once for each pass.
    """
    due = [DueStep(*step.pool.blocks(step.slot), step.pool.steps[step.slot], step.params) for step in steps]
    if shares is not None:
        for block in due:
            shares.sum_parts(block.grads)
    outcomes = adamw_steps(due, shares)
    reach("in optimizer")  # the weights are new, the counts of steps are not
    for step, outcome in zip(steps, outcomes, strict=True):
        step.pool.has_grads[step.slot] = False
        step.pool.steps[step.slot] += not isinstance(outcome, NonFiniteGradientError)
        step.pool.adapter(step.slot).refresh()
    return outcomes


@dataclass(frozen=True, slots=True)
class DueStep:
    """One adapter's step. weights, grads, exp_avg, exp_avg_sq: contiguous float32, one shape.

    steps_taken: how many steps the moments have seen before this one.
    """

    weights: torch.Tensor
    grads: torch.Tensor
    exp_avg: torch.Tensor
    exp_avg_sq: torch.Tensor
    steps_taken: int
    params: AdamParams


def adamw_steps(
    due: Sequence[DueStep], shares: Shares | None = None
) -> list[dict[str, float] | NonFiniteGradientError]:
    """Take all steps; an item is its step's metrics, or why the step was refused.

    A refused step leaves weights and moments as they are. Gradients are zero afterwards in either case.
    Metrics: ``grad_norm`` before clipping, ``learning_rate``.
    """
    outcomes: list[dict[str, float] | NonFiniteGradientError] = []
    accepted: dict[AdamParams, list[DueStep]] = {}
    for step, norm in zip(due, _norms([step.grads for step in due], shares), strict=True):
        if not math.isfinite(norm):
            outcomes.append(NonFiniteGradientError(_NOT_FINITE))
            continue
        outcomes.append({"grad_norm": norm, "learning_rate": step.params.learning_rate})
        accepted.setdefault(step.params, []).append(step)
        max_norm = step.params.grad_clip_norm
        if max_norm > 0 and max_norm < norm + _CLIP_EPS:
            step.grads.mul_(max_norm / (norm + _CLIP_EPS))
    for params, steps in accepted.items():
        _adamw(steps, params)
    for step in due:
        step.grads.zero_()
    return outcomes


def _norms(blocks: Sequence[torch.Tensor], shares: Shares | None) -> list[float]:
    """The 2-norm of each block over all ranks; columns that all ranks have count once."""
    if shares is None or not shares.is_split or not blocks:
        return _global_norms(blocks)
    common = _global_norms([shares.replicated(block) for block in blocks])
    own = torch.tensor(_global_norms([shares.own(block) for block in blocks]), dtype=torch.float64) ** 2
    shares.ranks.sum_(own)
    return [math.sqrt(one**2 + float(other)) for one, other in zip(common, own, strict=True)]


def _global_norms(blocks: Sequence[torch.Tensor]) -> list[float]:
    """The 2-norm of each block; not finite if an element is not, or if its square overflows float32.

    In short float32 pieces and then in float64: one float32 sum over 5e7 elements is wrong by 0.4 %, and
    float64 throughout takes forty times as long. One transfer for all blocks.
    """
    if not blocks:
        return []
    norms = []
    for block in blocks:
        flat = block.reshape(-1)
        whole = flat.numel() - flat.numel() % _NORM_CHUNK
        pieces = torch.linalg.vector_norm(flat[:whole].view(-1, _NORM_CHUNK), dim=1)
        rest = torch.linalg.vector_norm(flat[whole:]).unsqueeze(0)
        norms.append(torch.linalg.vector_norm(torch.cat((pieces, rest)), dtype=torch.float64))
    return torch.stack(norms).tolist()


def _adamw(steps: Sequence[DueStep], params: AdamParams) -> None:
    """Steps with the same hyperparameters, in one call of the fused kernel."""
    adamw(
        [step.weights for step in steps],
        [step.grads for step in steps],
        [step.exp_avg for step in steps],
        [step.exp_avg_sq for step in steps],
        [],
        [torch.tensor(float(step.steps_taken), device=step.weights.device) for step in steps],
        fused=True,
        amsgrad=False,
        maximize=False,
        lr=params.learning_rate,
        beta1=params.beta1,
        beta2=params.beta2,
        eps=max(params.eps, _SMALLEST_EPS),
        weight_decay=params.weight_decay,
    )
