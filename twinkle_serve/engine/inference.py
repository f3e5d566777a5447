"""The base model without gradients, as a straight line of few operators: what sampling runs.

A decode step has few rows, so what it costs beyond reading the weights is the number of operators and Python
calls. The same weights as in training, in the usual pre-norm layer of Llama, Mistral, Mixtral, Qwen2, Qwen3
and Qwen3-MoE; it is used only where its numbers agree with those of the modules (``Inference.of``). Knows
layers and low-rank products; does not know sequences, blocks of the cache, or backward.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn

from twinkle_serve.engine.adapter_pool import Block
from twinkle_serve.engine.agreement import disagreement
from twinkle_serve.engine.attention import PackedCausal
from twinkle_serve.engine.base_model import BaseModel
from twinkle_serve.engine.frozen import product_into
from twinkle_serve.engine.inference_mlp import Mlp, Projection, mlp_of
from twinkle_serve.engine.norms import FrozenRMSNorm
from twinkle_serve.engine.pulse import PULSE

logger = logging.getLogger(__name__)

_PROBE = (7, 3, 3, 3, 3, 3, 3)
"""Lengths of random sequences."""
_TOLERANCE = 1e-4
_TOLERANCE_BFLOAT16 = 0.02
"""Right models of 2 to 30 layers were seen to differ by 0.005 to 0.011; one whose mixture weighs its experts
wrongly by 0.037 and more."""


class RowAttend(Protocol):
    """Attention of packed rows that also stores their keys and values: query [T, Hq, D], kv [T, 2, Hkv, D]
    -> [T, Hq * D]."""

    def rows(
        self, layer: int, query: torch.Tensor, kv: torch.Tensor, scale: float | None, window: int | None
    ) -> torch.Tensor: ...


class Norm:
    """norms.FrozenRMSNorm with fewer operators where float32 needs no conversions."""

    def __init__(self, module: FrozenRMSNorm) -> None:
        self._weight = module.weight
        self._width = module.weight.shape[-1]
        self._plain = module.weight.dtype == torch.float32
        self._module = module
        self._eps = torch.full((1,), module.eps, device=module.weight.device)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        if not self._plain:
            return self._module(x)
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        return (x * torch.addcmul(self._eps, norm, norm, value=1 / self._width).rsqrt_()).mul_(self._weight)


class HeadNorms:
    """The norms over each head of query and key, in place."""

    def __init__(self, query: FrozenRMSNorm, key: FrozenRMSNorm, heads: tuple[int, int]) -> None:
        self._modules, self._heads = (query, key), heads
        self._together = query.weight.dtype == torch.float32 and query.eps == key.eps
        self._width = query.weight.shape[0]
        weights = [m.weight.expand(n, -1) for m, n in zip(self._modules, heads, strict=True)]
        self._weight = torch.cat(weights).detach()
        self._eps = torch.full((1,), query.eps, device=query.weight.device)

    def __call__(self, heads: torch.Tensor) -> None:
        """heads: [T, Hq + Hkv, D]."""
        if self._together:
            norm = torch.linalg.vector_norm(heads, dim=-1, keepdim=True)
            scale = torch.addcmul(self._eps, norm, norm, value=1 / self._width).rsqrt_()
            heads.mul_(scale).mul_(self._weight)
        else:
            for module, part in zip(self._modules, heads.split(self._heads, 1), strict=True):
                part.copy_(module(part))


@dataclass(frozen=True, slots=True)
class _Layer:
    """One decoder layer."""

    attention_norm: Norm
    query: Projection
    key: Projection
    value: Projection
    head_norms: HeadNorms | None
    out: Projection
    scale: float | None
    window: int | None
    mlp_norm: Norm
    mlp: Mlp


class Inference:
    """Use ``of``. ``head_dim``: of keys and queries alike."""

    def __init__(self, base: BaseModel, layers: Sequence[_Layer], norm: Norm, head_dim: int) -> None:
        self._base = base
        self._layers = layers
        self._norm = norm
        self._head_dim = head_dim
        self._embedding: nn.Module = base.model.get_input_embeddings()
        self._rotary: nn.Module = base.model.base_model.rotary_emb
        query, key = layers[0].query.width, layers[0].key.width
        self._widths = (query, key, key)
        self._num_heads = (query // head_dim, key // head_dim)

    @classmethod
    def of(cls, base: BaseModel) -> Inference | None:
        """None where the model's layers are not the usual ones, or the numbers disagree."""
        found = _recognize(base)
        if found is None:
            logger.info("%s is sampled through its modules", base.info.arch)
            return None
        error = found._error()
        if not error <= (_TOLERANCE if base.dtype == torch.float32 else _TOLERANCE_BFLOAT16):
            logger.warning("%s is sampled through its modules: they differ by %.2g", base.info.arch, error)
            return None
        return found

    @torch.no_grad()
    def hidden_states(
        self,
        token_ids: torch.Tensor,
        position_ids: torch.Tensor,
        attend: RowAttend,
        blocks: Sequence[Block] = (),
    ) -> torch.Tensor:
        """Final hidden states [T, H] of packed int64 rows [T]."""
        x = self._embedding(token_ids)
        cos, sin = self._rotary(x, position_ids.unsqueeze(0))
        cos, sin = cos[0].unsqueeze(1), sin[0].unsqueeze(1).clone()
        sin[..., : self._head_dim // 2].neg_()  # for the half that rotation turns around
        for index, layer in enumerate(self._layers):
            h = layer.attention_norm(x)
            query, kv = self._project(layer, h, cos, sin, blocks)
            attended = attend.rows(index, query, kv, layer.scale, layer.window)
            x = layer.out.add_to(x, attended, blocks)
            x = layer.mlp(x, layer.mlp_norm(x), blocks)
            PULSE.beat()  # no module is called, so nothing else shows that a long prompt gets on
        return self._norm(x)

    def _project(
        self, layer: _Layer, h: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, blocks: Sequence[Block]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Query [T, Hq, D], and key and value [T, 2, Hkv, D], all in one piece of memory."""
        num_rows, (queries, keys) = h.shape[0], self._num_heads
        rows = h.new_empty(num_rows, sum(self._widths))
        query, key, value = rows.split(self._widths, 1)
        layer.query.into(query, h, blocks)
        layer.key.into(key, h, blocks)
        layer.value.into(value, h, blocks)
        heads = rows.view(num_rows, queries + 2 * keys, self._head_dim)
        turned = heads[:, : queries + keys]
        if layer.head_norms is not None:
            layer.head_norms(turned)
        other = torch.roll(turned, self._head_dim // 2, -1)
        turned.mul_(cos).addcmul_(other, sin)
        return heads[:, :queries], heads[:, queries:].view(num_rows, 2, keys, self._head_dim)

    @torch.no_grad()
    def logits(self, hidden: torch.Tensor, blocks: Sequence[Block]) -> torch.Tensor:
        """float32 [T, V]: all logits of a few rows."""
        head, target = self._base.head, self._base.head_target
        if head.weight.dtype != torch.float32:
            logits = self._base.full_logits(hidden, ())
        else:
            logits = hidden.new_empty(hidden.shape[0], head.weight.shape[0])
            product_into(logits, hidden, head.weight)
            if head.bias is not None:
                logits.add_(head.bias)
        for block in blocks:
            block.add(logits, hidden.float(), *block.views.head(target))
        return logits

    def _error(self) -> float:
        """How far the hidden states are from the modules' own, relative to the largest of these."""
        device = self._base.device
        generator = torch.Generator().manual_seed(0)
        tokens = torch.randint(0, self._base.info.vocab_size, (sum(_PROBE),), generator=generator).to(device)
        positions = torch.cat([torch.arange(length) for length in _PROBE]).to(device)
        self._base.segments.set({})
        with torch.no_grad():
            expected = self._base.hidden_states(tokens, positions, PackedCausal(_PROBE)).float()
        found = self.hidden_states(tokens, positions, _Uncached(_PROBE)).float()
        return disagreement(found, expected, expected.abs().max(), self._base.dtype)


class _Uncached:
    """RowAttend over whole sequences."""

    def __init__(self, lengths: Sequence[int]) -> None:
        self._attend = PackedCausal(lengths)

    def rows(
        self, layer: int, query: torch.Tensor, kv: torch.Tensor, scale: float | None, window: int | None
    ) -> torch.Tensor:
        q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in (query, kv[:, 0], kv[:, 1]))
        return self._attend(layer, q, k, v, scale, window)[0].flatten(1)


class _Noted(PackedCausal):
    """Notes with which scale and window each layer's module attends."""

    def __init__(self) -> None:
        super().__init__([1])
        self.seen: dict[int, tuple[float | None, int | None]] = {}

    def __call__(
        self,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scale: float | None,
        window: int | None,
    ) -> torch.Tensor:
        self.seen[layer] = scale, window
        return super().__call__(layer, query, key, value, scale, window)


_NAMES = {"input_layernorm", "self_attn", "post_attention_layernorm", "mlp"}
_ATTENTION_NAMES = ("q_proj", "k_proj", "v_proj", "o_proj")
_QK_NORMS = ("q_norm", "k_norm")


def _recognize(base: BaseModel) -> Inference | None:
    inner: Any = base.model.base_model
    # Before anything is asked of a part: only by its names and shapes is it one that we know.
    if base.config.ranks > 1 or not _is_norm(getattr(inner, "norm", None)):
        return None
    # Some have a rotation for each kind of layer, and no inv_freq of their own.
    if not hasattr(getattr(inner, "rotary_emb", None), "inv_freq"):
        return None
    if not all(_has_usual_parts(layer) for layer in inner.layers):
        return None
    noted, zero = _Noted(), torch.zeros(1, dtype=torch.int64, device=base.device)
    base.segments.set({})
    with torch.no_grad():
        base.hidden_states(zero, zero, noted)
        turned = inner.rotary_emb(torch.zeros(1, dtype=base.dtype, device=base.device), zero.unsqueeze(0))
    head_dim = turned[0].shape[-1]
    layers = [
        _layer(base, layer, head_dim, noted.seen.get(index)) for index, layer in enumerate(inner.layers)
    ]
    found = [layer for layer in layers if layer is not None]
    if len(found) < len(layers) or len({(layer.query.width, layer.key.width) for layer in found}) > 1:
        return None
    return Inference(base, found, Norm(inner.norm), head_dim)


def _has_usual_parts(layer: nn.Module) -> bool:
    if {name for name, _ in layer.named_children()} != _NAMES:
        return False
    attention = {name for name, _ in layer.get_submodule("self_attn").named_children()}
    return attention in ({*_ATTENTION_NAMES}, {*_ATTENTION_NAMES, *_QK_NORMS})


def _layer(
    base: BaseModel, module: Any, head_dim: int, noted: tuple[float | None, int | None] | None
) -> _Layer | None:
    attention = module.self_attn
    norms = [module.input_layernorm, module.post_attention_layernorm]
    head_norms = [getattr(attention, name) for name in _QK_NORMS if hasattr(attention, name)]
    usual = getattr(attention, "head_dim", None) == head_dim
    usual &= all(_is_norm(norm) for norm in [*norms, *head_norms])
    if noted is None or not usual or any(norm.weight.shape != (head_dim,) for norm in head_norms):
        return None
    mlp = mlp_of(base, module.mlp)
    if mlp is None:
        return None
    query, key, value, out = (Projection.of(getattr(attention, name)) for name in _ATTENTION_NAMES)
    heads = (query.width // head_dim, key.width // head_dim)
    return _Layer(
        attention_norm=Norm(norms[0]),
        query=query,
        key=key,
        value=value,
        head_norms=HeadNorms(head_norms[0], head_norms[1], heads) if head_norms else None,
        out=out,
        scale=noted[0],
        window=noted[1],
        mlp_norm=Norm(norms[1]),
        mlp=mlp,
    )


def _is_norm(module: object) -> bool:
    return isinstance(module, FrozenRMSNorm)
