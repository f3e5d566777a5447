"""Every loss by name, as plain autograd on the per-token logprobs of one request.

Knows the formulas and what each reports. Does not know logits, models, slots or other requests; names, inputs
and defaults are those of protocol/losses.py. Losses are sums, never normalised, so requests simply add up.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from twinkle_serve.protocol.errors import UserError
from twinkle_serve.protocol.losses import LossSpec, find_loss

Inputs = Mapping[str, torch.Tensor]
Config = Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Loss:
    """``value``: scalar with a graph back to the logprobs. ``metrics``: detached float64 scalars.

    Every metric is a sum over positions, so those of chunks, datums and microbatches simply add up; its name
    holds exactly one colon and ends in ``:sum``, and ``loss:sum`` is always there.
    """

    value: torch.Tensor
    metrics: dict[str, torch.Tensor]


def compute_loss(
    name: str, logprobs: torch.Tensor, inputs: Inputs, lengths: torch.Tensor, config: Config
) -> Loss:
    """The loss ``name`` of one request, or of some of its datums.

    logprobs: float32 [n], of the target tokens, datums end to end.
    inputs: the other loss inputs by name, each [n].
    lengths: int64 [num_datums] on the same device, elements per datum; they add up to n.
    config: settings; an absent one has the default of protocol/losses.py.
    Raises UserError for an unknown loss or a missing input.
    """
    if name in _ADDED:
        added, formula = _ADDED[name]
        return formula(logprobs, inputs, lengths, {**added.config, **config})
    spec = find_loss(name)
    per_token, extra = _FORMULAS[name](logprobs, inputs, lengths, {**spec.config, **config})
    # float64: the sum of many small float32 numbers should not depend on how they were chunked.
    value = per_token.sum(dtype=torch.float64)
    metrics = {"loss:sum": value.detach()}
    metrics.update((key, term.detach().sum(dtype=torch.float64)) for key, term in extra.items())
    return Loss(value, metrics)


def add_loss(spec: LossSpec, formula: Callable[..., Loss]) -> None:
    """Let ``compute_loss`` find one more. ``formula`` takes what the built-in ones take."""
    _ADDED[spec.name] = (spec, formula)


_ADDED: dict[str, tuple[LossSpec, Callable[..., Loss]]] = {}

PerToken = tuple[torch.Tensor, dict[str, torch.Tensor]]
"""The loss at each position, and what else is summed over the positions as a metric."""

Formula = Callable[[torch.Tensor, Inputs, torch.Tensor, Config], PerToken]


def _cross_entropy(logprobs: torch.Tensor, inputs: Inputs, lengths: torch.Tensor, config: Config) -> PerToken:
    weights = inputs.get("weights")
    if weights is None:
        return -logprobs, {"weight:sum": torch.ones_like(logprobs)}
    return -logprobs * weights, {"weight:sum": weights}


def _importance_sampling(
    logprobs: torch.Tensor, inputs: Inputs, lengths: torch.Tensor, config: Config
) -> PerToken:
    advantages = _required(inputs, "advantages")
    log_ratio = _where_it_counts(logprobs - _required(inputs, "logprobs"), advantages)
    return -log_ratio.exp() * advantages, _policy_metrics(log_ratio, advantages)


def _ppo(logprobs: torch.Tensor, inputs: Inputs, lengths: torch.Tensor, config: Config) -> PerToken:
    advantages = _required(inputs, "advantages")
    log_ratio = _where_it_counts(logprobs - _required(inputs, "logprobs"), advantages)
    return _clipped_surrogate(log_ratio, log_ratio.exp(), advantages, inputs, config)


def _cispo(logprobs: torch.Tensor, inputs: Inputs, lengths: torch.Tensor, config: Config) -> PerToken:
    advantages = _required(inputs, "advantages")
    log_ratio = _where_it_counts(logprobs - _required(inputs, "logprobs"), advantages)
    ratio = log_ratio.detach().exp()
    clipped = _clip(ratio, inputs, config)
    metrics = _policy_metrics(log_ratio, advantages)
    metrics["clipped_tokens:sum"] = ((clipped != ratio) & (advantages != 0)).float()
    return -clipped * logprobs * advantages, metrics


def _dro(logprobs: torch.Tensor, inputs: Inputs, lengths: torch.Tensor, config: Config) -> PerToken:
    advantages = _required(inputs, "advantages")
    log_ratio = logprobs - _required(inputs, "logprobs")
    penalty = 0.5 * config["beta"] * log_ratio.square()
    return penalty - logprobs * advantages, _policy_metrics(log_ratio, advantages)


def _gspo(logprobs: torch.Tensor, inputs: Inputs, lengths: torch.Tensor, config: Config) -> PerToken:
    advantages = _required(inputs, "advantages")
    fixed = logprobs.detach()
    log_ratio = fixed - _required(inputs, "logprobs")
    mask = inputs.get("sequence_ratio_mask")
    mean = _datum_mean(log_ratio, torch.ones_like(fixed) if mask is None else mask, lengths)
    # The value is the sequence's ratio; the gradient flows through each token's own logprob.
    ratio = _where_it_counts(mean + (logprobs - fixed), advantages).exp()
    return _clipped_surrogate(log_ratio, ratio, advantages, inputs, config)


_FORMULAS: dict[str, Formula] = {
    "cross_entropy": _cross_entropy,
    "importance_sampling": _importance_sampling,
    "ppo": _ppo,
    "cispo": _cispo,
    "dro": _dro,
    "gspo": _gspo,
}


def _required(inputs: Inputs, name: str) -> torch.Tensor:
    tensor = inputs.get(name)
    if tensor is None:
        raise UserError(f"loss input {name!r} is missing")
    return tensor


def _where_it_counts(log_ratio: torch.Tensor, advantages: torch.Tensor) -> torch.Tensor:
    """The log-ratio, but 0 where the advantage is 0: prompt positions carry arbitrary sampled logprobs, whose
    ratio may overflow, and inf * 0 is NaN."""
    return torch.where(advantages == 0, 0.0, log_ratio)


def _clip(ratio: torch.Tensor, inputs: Inputs, config: Config) -> torch.Tensor:
    """The ratio within its thresholds, which are per-token inputs or else the config's numbers."""
    low, high = (
        inputs[name] if name in inputs else ratio.new_tensor(config[name])
        for name in ("clip_low_threshold", "clip_high_threshold")
    )
    return ratio.clamp(low, high)


def _clipped_surrogate(
    log_ratio: torch.Tensor, ratio: torch.Tensor, advantages: torch.Tensor, inputs: Inputs, config: Config
) -> PerToken:
    """-min(r A, clip(r) A), the same for ppo and gspo."""
    free, clipped = ratio * advantages, _clip(ratio, inputs, config) * advantages
    metrics = _policy_metrics(log_ratio, advantages)
    metrics["clipped_tokens:sum"] = (clipped < free).float()
    return -torch.minimum(free, clipped), metrics


def _policy_metrics(log_ratio: torch.Tensor, advantages: torch.Tensor) -> dict[str, torch.Tensor]:
    """Tokens that count, and over those the estimate -log(p / p_sampled) of KL(sampled || trained)."""
    counted = (advantages != 0).float()
    return {"scored_tokens:sum": counted, "kl_sampled_trained:sum": torch.where(counted > 0, -log_ratio, 0.0)}


def _datum_mean(values: torch.Tensor, mask: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """Each datum's mean of ``values`` over ``mask`` [n], repeated for all its positions; 0 if nothing counts.

    One reduction per datum and not a scatter over all of them: the result must not depend on which datums
    share the call, nor on the order in which a GPU adds.
    """
    means = []
    parts = zip(values.split(lengths.tolist()), mask.split(lengths.tolist()), strict=True)
    for datum_values, datum_mask in parts:
        counted = datum_mask.sum().clamp(min=1)
        means.append(((datum_values * datum_mask).sum() / counted).expand_as(datum_values))
    return torch.cat(means)
