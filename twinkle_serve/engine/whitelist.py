"""Losses from the operator's whitelist, loaded once when a rank starts.

Knows the interface: ``loss(logprobs, inputs, lengths, settings)`` in loss.py gives a scalar tensor and a dict
of scalar metrics. ``logprobs``: float32 [n], the targets' logprobs of several datums end to end; ``inputs``:
the request's other tensors by name, float32 [n] each; ``lengths``: int64 [num_datums]; ``settings``: numbers
by name. Both results must be sums over datums: requests are cut into pieces of whole datums, which are
added. Does not know where a loss comes from (hub/losses.py), and runs no bytes but those that were hashed.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import torch

from twinkle_serve.engine.losses import Config, Inputs, Loss, add_loss
from twinkle_serve.hub.losses import LossSource, LossSourceError, spec_of, verified
from twinkle_serve.loss_config import WhitelistedLoss
from twinkle_serve.protocol.errors import UserError

logger = logging.getLogger(__name__)
_METRIC = re.compile(r"[a-z][a-z0-9_]{0,63}")
Function = Callable[..., Any]


def load_losses(entries: Sequence[WhitelistedLoss]) -> None:
    """Make every loss of the whitelist one that compute_loss finds. Raises LossSourceError."""
    for entry in entries:
        source = verified(entry)
        add_loss(spec_of(source.terms), checked_formula(source))
        logger.info("loss %s is loaded from %s at %s", entry.name, entry.path, entry.revision)


def checked_formula(source: LossSource) -> Callable[..., Loss]:
    """The loss as compute_loss calls it, after a trial. Raises LossSourceError."""
    name = source.terms.name
    module = ModuleType(f"whitelisted_{name}")
    try:
        exec(compile(source.code, f"<loss {name}>", "exec"), module.__dict__)
        function = module.loss
    except Exception as error:
        raise LossSourceError(f"loss {name}: loss.py fails: {type(error).__name__}: {error}") from None

    def formula(logprobs: torch.Tensor, inputs: Inputs, lengths: torch.Tensor, settings: Config) -> Loss:
        return _call(name, function, logprobs, inputs, lengths, settings)

    try:
        _try(source, formula)
    except UserError as error:
        raise LossSourceError(f"the trial of {error}") from None
    return formula


def _try(source: LossSource, formula: Callable[..., Loss]) -> None:
    """Two datums together must be worth as much as one and one. Raises UserError."""
    name, settings = source.terms.name, dict(source.terms.settings)
    logprobs = torch.tensor([-0.5, -1.0, -2.0, -1.5, -0.25])
    columns = {each: torch.linspace(0.1, 1.0, 5) for each in (*source.terms.inputs, *source.terms.optional)}
    values = []
    for parts in (((0, 5, [2, 3]),), ((0, 2, [2]), (2, 5, [3]))):
        value = 0.0
        for start, end, lengths in parts:
            leaf = logprobs[start:end].clone().requires_grad_()
            inputs = {key: column[start:end] for key, column in columns.items()}
            found = formula(leaf, inputs, torch.tensor(lengths), settings)
            if torch.autograd.grad(found.value, leaf, allow_unused=True)[0] is None:
                raise UserError(f"loss {name}: it does not depend on logprobs")
            value += float(found.value.detach())
        values.append(value)
    if abs(values[0] - values[1]) > 1e-4 * (1 + abs(values[0])):
        raise UserError(f"loss {name}: two datums give {values[0]:g} together and {values[1]:g} one by one")


def _call(name: str, function: Function, *arguments: Any) -> Loss:
    try:
        value, metrics = function(*arguments)
    except Exception as error:
        raise UserError(f"loss {name}: {type(error).__name__}: {str(error)[:300]}") from None
    if not isinstance(value, torch.Tensor) or value.ndim != 0 or not value.requires_grad:
        raise UserError(f"loss {name}: it must give a scalar tensor that depends on logprobs")
    total = value.double()
    found = {"loss:sum": total.detach()}
    for key, number in metrics.items():
        if not _METRIC.fullmatch(key) or key == "loss":
            raise UserError(f"loss {name}: {key!r:.80} cannot name a metric: lowercase letters, digits and _")
        found[f"{key}:sum"] = torch.as_tensor(number).detach().double().reshape(())
    return Loss(total, found)
