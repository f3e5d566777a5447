"""The frozen norm against transformers' own, forward and backward."""

import pytest
import torch
from torch import nn
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from twinkle_serve.engine.norms import FrozenRMSNorm, replace_norms


@pytest.mark.parametrize("shape", [(1, 7, 16), (1, 7, 4, 16)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equals_the_norm_it_replaces(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    original = LlamaRMSNorm(16, eps=1e-5).to(dtype)
    original.weight.data.normal_()
    frozen = FrozenRMSNorm(original.weight.detach(), 1e-5)
    x = torch.randn(shape, dtype=dtype)
    dy = torch.randn(shape, dtype=dtype)
    ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    y, expected = frozen(ours), original(theirs)
    y.backward(dy)
    expected.backward(dy)
    assert ours.grad is not None
    assert theirs.grad is not None
    tolerance = {"rtol": 1e-5, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 2e-2}
    torch.testing.assert_close(y, expected, **tolerance)
    torch.testing.assert_close(ours.grad, theirs.grad, **tolerance)


def test_a_row_of_zeros_is_no_trouble() -> None:
    x = torch.zeros(1, 4, requires_grad=True)
    FrozenRMSNorm(torch.ones(4), 1e-6)(x).sum().backward()
    assert x.grad is not None
    assert torch.isfinite(x.grad).all()


def test_replaces_only_norms_of_this_kind() -> None:
    class OtherRMSNorm(nn.Module):  # Gemma's: no variance_epsilon, and 1 + weight
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.eps = nn.Parameter(torch.ones(4)), 1e-6

    model = nn.ModuleDict({"a": LlamaRMSNorm(4), "b": OtherRMSNorm(), "c": nn.LayerNorm(4)})
    assert replace_norms(model) == 1
    assert isinstance(model["a"], FrozenRMSNorm)
    assert isinstance(model["b"], OtherRMSNorm)
