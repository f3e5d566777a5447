"""Losses as users write them, traced and encoded by the SDK itself, and what it computes from them.

The SDK's own client-side run of a traced loss is the reference for the server's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from tinker import types
from tinker.lib.public_interfaces.custom_loss import encode_graph, run_loss_handle, trace_loss

from twinkle_serve.protocol.loss_graph import LossGraph, check_graph, read_graph

Ranks = Mapping[str, Any]
Inputs = Mapping[str, torch.Tensor]


def wire(loss: Callable[..., Any], **ranks: Any) -> dict[str, Any]:
    """The fields of create_custom_loss as the SDK sends them."""
    handle = trace_loss(loss, ranks, "session")
    return {
        "name": handle.name,
        "inputs": [each.model_dump() for each in handle.inputs],
        "graph": encode_graph(handle).model_dump(),
    }


def uploaded(loss: Callable[..., Any], **ranks: Any) -> LossGraph:
    return read_graph(check_graph(**wire(loss, **ranks)))


def on_the_client(
    loss: Callable[..., Any],
    ranks: Ranks,
    logprobs: Sequence[torch.Tensor],
    data: Sequence[Mapping[str, Any]],
) -> tuple[float, list[torch.Tensor], dict[str, float]]:
    """Value, gradients and metrics by the SDK, whose clients compute in float32."""
    handle = trace_loss(loss, ranks, "session")
    datums = [
        types.Datum(
            model_input=types.ModelInput.from_ints([1]),
            loss_fn_inputs={key: types.TensorData.from_torch(value) for key, value in inputs.items()},
        )
        for inputs in data
    ]
    leaves = [each.clone().requires_grad_() for each in logprobs]
    total, metrics = run_loss_handle(handle, datums, leaves)
    total.backward()
    gradients = [leaf.grad for leaf in leaves if leaf.grad is not None]
    return float(total.detach()), gradients, metrics


def reinforce(logprobs, advantages):
    loss = -(logprobs * advantages).sum()
    return loss, {"custom/loss:sum": loss, "custom/advantage:mean": advantages.mean()}


def clipped_surrogate(logprobs, sampled, advantages, mask):
    ratio = torch.exp(logprobs - sampled)
    clipped = torch.clamp(ratio, 1 - 0.2, 1 + 0.28)
    objective = torch.minimum(ratio * advantages, clipped * advantages)
    loss = -(objective * mask).sum() / mask.sum().clamp(min=1)
    is_clipped = ((ratio - clipped).abs() > 0).float() * mask
    return loss, {"custom/clipped:sum": is_clipped.sum()}


def dpo_with_reference(logprobs, reference, weights):
    margin = ((logprobs - reference) * weights).sum()
    return -F.logsigmoid(0.1 * margin), {"custom/margin:mean": margin.detach()}


def k3_penalty(logprobs, reference, beta):
    difference = reference - logprobs
    kl = torch.expm1(difference) - difference
    return beta * kl.mean() - logprobs.mean(), {"custom/kl:mean": kl.mean()}


def focal(logprobs, weights):
    p = logprobs.exp()
    return -(((1 - p) ** 2) * logprobs * weights).sum(), {}


def only_where_it_counts(logprobs, mask):
    chosen = logprobs[mask > 0]
    return -chosen.mean() + chosen.std(unbiased=False) * math.pi, {"custom/n:sum": (mask > 0).float().sum()}


def distilled(logprobs, teacher):
    """[T, K]: cross entropy to a teacher's distribution over K candidates, renormalised."""
    student = F.log_softmax(logprobs, dim=-1)
    target = F.softmax(teacher / 2.0, dim=-1)
    loss = F.kl_div(student, target, reduction="sum")
    best = torch.max(logprobs, dim=-1).values
    return loss + 0.01 * torch.logsumexp(logprobs, -1).square().sum(), {"custom/best:mean": best.mean()}


def smooth(logprobs, weights):
    n = logprobs.shape[0]
    position = torch.arange(n, dtype=torch.float32, device=logprobs.device) / n
    steps = logprobs[1:] - logprobs[:-1]
    pairs = logprobs.unsqueeze(0) - logprobs.unsqueeze(1)
    ranked = torch.sort(logprobs, descending=True)
    return (
        (steps**2).sum()
        + torch.sigmoid(pairs).triu(1).sum()
        - (logprobs * weights * position).sum()
        + torch.cumsum(logprobs, 0)[-1]
        + ranked.values[0]
        + torch.stack([logprobs.sum(), logprobs.mean()]).max()
        + torch.where(weights > 0.5, logprobs, torch.zeros_like(logprobs)).sum()
    ), {"custom/n:sum": weights.new_ones(n).sum()}


def picked(logprobs, index):
    """An input of whole numbers."""
    return -logprobs.gather(0, index).sum() - logprobs[index].mean(), {}


LOSSES: Sequence[tuple[Callable[..., Any], dict[str, Any]]] = (
    (reinforce, {"logprobs": 1, "advantages": 1}),
    (clipped_surrogate, {"logprobs": 1, "sampled": 1, "advantages": 1, "mask": 1}),
    (dpo_with_reference, {"logprobs": 1, "reference": 1, "weights": 1}),
    (k3_penalty, {"logprobs": 1, "reference": 1, "beta": 0}),
    (focal, {"logprobs": 1, "weights": 1}),
    (only_where_it_counts, {"logprobs": 1, "mask": 1}),
    (distilled, {"logprobs": 2, "teacher": 2}),
    (smooth, {"logprobs": 1, "weights": 1}),
    (picked, {"logprobs": 1, "index": 1}),
)
