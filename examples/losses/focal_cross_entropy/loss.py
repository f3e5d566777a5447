"""Focal cross entropy: each token's loss is scaled by (1 - p)^gamma, so what is known already counts less."""

import torch


def loss(
    logprobs: torch.Tensor,
    inputs: dict[str, torch.Tensor],
    lengths: torch.Tensor,
    settings: dict[str, float],
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """logprobs, and each of inputs: float32 [n], all datums end to end. Returns a sum over them, and sums."""
    doubt = (1 - logprobs.detach().exp()) ** settings["gamma"]
    value = -(doubt * logprobs * inputs["weights"]).sum()
    return value, {"doubt": (doubt * inputs["weights"]).sum()}
