"""Drawing tokens from rows of logits, each row with its own parameters and random stream, and when to stop.

A row's token depends on its logits, parameters, seed and position only, never on the rows beside it. Knows
logits and token ids; does not know the model, sequences or the KV cache.
"""

from __future__ import annotations

import struct
from collections import deque
from collections.abc import Callable, Sequence
from hashlib import blake2b
from typing import NamedTuple

import numpy as np
import torch

from twinkle_serve.protocol.data import SamplingParams, TopK

_BLOCK = 512
"""A drawn number is looked up among sums of this many tokens first, and then inside one block."""

_CANDIDATES = 1024
"""Tokens sorted to be cut by top_k and top_p, or the largest top_k if that is more; a row that top_p alone
cuts, and whose nucleus is wider, sorts more, and then more."""

_EMPTY_CELL = (0, -99999.0)

_COLDEST = 1e-30
"""A lower temperature draws the same, and what is lower still is 0 in float32."""


class DrawParams(NamedTuple):
    """How one row's next token is drawn; ``uniform`` in [0, 1) is the row's random number."""

    temperature: float
    top_k: int
    top_p: float
    uniform: float

    @property
    def truncated(self) -> bool:
        return self.top_k > 0 or self.top_p < 1


class Drawn(NamedTuple):
    """tokens int64 [B], logprobs float32 [B], and the k best tokens of each row if they were asked for.

    A row whose logits are not finite has a NaN logprob.
    """

    tokens: torch.Tensor
    logprobs: torch.Tensor
    topk: TopK | None


class UniformStream:
    """The random numbers of sample ``index`` of a request, in [0, 1): a hash of the position, so that streams
    need no state and are the same in any batch."""

    _AT_ONCE = 8

    def __init__(self, seed: int, index: int) -> None:
        self._seed = seed % 2**64
        self._index = index
        self._block = -1
        self._numbers: list[float] = []

    def at(self, position: int) -> float:
        block, place = divmod(position, self._AT_ONCE)
        if block != self._block:
            digest = blake2b(struct.pack("<QQQ", self._seed, self._index, block)).digest()
            self._numbers = [(bits >> 11) / 2**53 for bits in struct.unpack("<8Q", digest)]
            self._block = block
        return self._numbers[place]


def draw_tokens(logits: torch.Tensor, params: Sequence[DrawParams], topk: int = 0) -> Drawn:
    """One token for each row of ``logits``, float32 [B, V], which is overwritten.

    Logprobs, those of the ``topk`` best tokens too, are under the distribution at the row's temperature,
    before top_k and top_p cut it; at temperature 0, under that at temperature 1.
    """
    assert len(params) == logits.shape[0]
    temperatures = [1.0 if p.temperature == 0 else max(p.temperature, _COLDEST) for p in params]
    logits -= logits.amax(dim=1, keepdim=True)  # before dividing: a tiny temperature must not overflow
    if any(temperature != 1 for temperature in temperatures):
        logits /= torch.tensor(temperatures, dtype=torch.float32, device=logits.device)[:, None]
    mass = _Mass.of(logits)
    methods = _by_method(params)
    if len(methods) == 1:
        tokens = methods[0][0](logits, mass, params)
    else:
        tokens = torch.empty(logits.shape[0], dtype=torch.int64, device=logits.device)
        for draw, rows in methods:
            index = torch.tensor(rows, device=logits.device)
            tokens[index] = draw(logits[index], mass.of_rows(index), [params[row] for row in rows])
    normalizer = mass.total.log()
    logprobs = (logits.gather(1, tokens[:, None]).double() - normalizer).squeeze(1).float()
    return Drawn(tokens, logprobs, _top_k(logits, normalizer, topk) if topk > 0 else None)


class _Mass(NamedTuple):
    """Unnormalised probabilities [b, V] of rows; float64 sums of blocks of them, [b, ceil(V / 512)], and of
    all, [b, 1]: the same for a row in any batch."""

    tokens: torch.Tensor
    blocks: torch.Tensor
    total: torch.Tensor

    @classmethod
    def of(cls, logits: torch.Tensor) -> _Mass:
        tokens = logits.exp()
        num_rows, vocab_size = tokens.shape
        whole = vocab_size - vocab_size % _BLOCK
        parts = []
        if whole:
            parts.append(tokens[:, :whole].view(num_rows, -1, _BLOCK).sum(dim=2).double())
        if whole < vocab_size:
            parts.append(tokens[:, whole:].sum(dim=1, keepdim=True).double())
        blocks = parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
        return cls(tokens, blocks, blocks.sum(dim=1, keepdim=True))

    def of_rows(self, index: torch.Tensor) -> _Mass:
        return _Mass(*(part[index] for part in self))


_Method = Callable[[torch.Tensor, _Mass, Sequence[DrawParams]], torch.Tensor]
"""(scaled logits [b, V], their mass, params) -> tokens [b]."""


def _by_method(params: Sequence[DrawParams]) -> list[tuple[_Method, list[int]]]:
    greedy = [row for row, p in enumerate(params) if p.temperature == 0]
    whole = [row for row, p in enumerate(params) if p.temperature > 0 and not p.truncated]
    truncated = [row for row, p in enumerate(params) if p.temperature > 0 and p.truncated]
    # Apart, since rows that are sorted together are sorted equally far.
    narrow = [row for row in truncated if params[row].top_k <= _CANDIDATES]
    wide = [row for row in truncated if params[row].top_k > _CANDIDATES]
    groups: list[tuple[_Method, list[int]]] = [(_greedy, greedy), (_whole, whole)]
    groups += [(_truncated, narrow), (_truncated, wide)]
    return [(method, rows) for method, rows in groups if rows]


def _greedy(logits: torch.Tensor, mass: _Mass, params: Sequence[DrawParams]) -> torch.Tensor:
    return logits.argmax(dim=1)


def _whole(logits: torch.Tensor, mass: _Mass, params: Sequence[DrawParams]) -> torch.Tensor:
    """Invert the cumulative distribution: first which block the number falls into, then which token."""
    vocab_size = logits.shape[1]
    block, rest = _invert(mass.blocks, _uniforms(params, logits.device) * mass.total)
    members = block * _BLOCK + torch.arange(_BLOCK, device=logits.device)
    if vocab_size % _BLOCK == 0:
        inside = mass.tokens.gather(1, members).double()
    else:
        outside = members >= vocab_size
        inside = mass.tokens.gather(1, members.clamp_(max=vocab_size - 1)).double().masked_fill_(outside, 0)
    token, _ = _invert(inside, rest)
    # A row that is not finite points anywhere; its logprob will be NaN.
    return (block * _BLOCK + token).squeeze(1).clamp_(max=vocab_size - 1)


def _truncated(
    logits: torch.Tensor,
    mass: _Mass,
    params: Sequence[DrawParams],
    num_candidates: int = _CANDIDATES,
) -> torch.Tensor:
    """The likeliest tokens, best first, cut by top_k and then by top_p, and one of them drawn."""
    vocab_size, device = logits.shape[1], logits.device
    limits = [min(p.top_k, vocab_size) if p.top_k > 0 else vocab_size for p in params]
    # top_p is a share of what top_k leaves, so all that it leaves has to be sorted.
    largest_cut = max((limit for limit in limits if limit < vocab_size), default=0)
    width = min(max(limits), max(num_candidates, largest_cut))
    top_k = torch.tensor(limits, device=device)
    top_p = torch.tensor([p.top_p for p in params], dtype=torch.float64, device=device)
    best, token_ids = mass.tokens.topk(width, dim=1)
    best = best.double()
    best[:, 1:].masked_fill_(torch.arange(1, width, device=device) >= top_k[:, None], 0)
    # A row that top_k does not cut has its whole mass.
    cumulative = best.cumsum(dim=1)
    nucleus = top_p * torch.where(top_k <= width, cumulative[:, -1], mass.total.squeeze(1))
    best[:, 1:].masked_fill_(cumulative[:, :-1] >= nucleus[:, None], 0)
    place, _ = _invert(best, _uniforms(params, device) * best.sum(dim=1, keepdim=True))
    tokens = token_ids.gather(1, place).squeeze(1)
    if width < max(limits):
        wider = ((top_k > width) & (cumulative[:, -1] < nucleus)).nonzero().squeeze(1)
        if wider.numel():
            own = [params[row] for row in wider.tolist()]
            more = num_candidates * 16
            tokens[wider] = _truncated(logits[wider], mass.of_rows(wider), own, more)
    return tokens


def _uniforms(params: Sequence[DrawParams], device: torch.device) -> torch.Tensor:
    """float64 [b, 1]."""
    return torch.tensor([p.uniform for p in params], dtype=torch.float64, device=device)[:, None]


def _invert(masses: torch.Tensor, target: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """For ``target`` [b, 1], the first index [b, 1] whose cumulative mass exceeds it, and how much of it lies
    inside. Never an index without mass, however the sums were rounded."""
    cumulative = masses.cumsum(dim=1)
    total = cumulative[:, -1:]
    target = torch.minimum(target, torch.nextafter(total, torch.zeros_like(total)))
    index = torch.searchsorted(cumulative, target, right=True).clamp_(max=masses.shape[1] - 1)
    before = cumulative.gather(1, index) - masses.gather(1, index)
    return index, (target - before).clamp_(min=0)


def _top_k(logits: torch.Tensor, normalizer: torch.Tensor, k: int) -> TopK:
    best, token_ids = logits.topk(min(k, logits.shape[1]), dim=1)
    logprobs = (best.double() - normalizer).float()
    shape = (logits.shape[0], k)
    result = TopK(np.full(shape, _EMPTY_CELL[0], np.int32), np.full(shape, _EMPTY_CELL[1], np.float32))
    result.token_ids[:, : best.shape[1]] = token_ids.cpu().numpy()
    result.logprobs[:, : best.shape[1]] = logprobs.cpu().numpy()
    return result


class StopRule:
    """When one sample ends: fed its tokens in order, it says after which one.

    decode: token ids to text, special tokens included. Only tokens that a stop string can span are decoded,
    so a token costs the same however long the sample is.
    """

    _SPARE_TOKENS = 8
    """Decoded besides: the first token of a window may lose a leading space, or be half a character."""

    def __init__(self, params: SamplingParams, decode: Callable[[Sequence[int]], str]) -> None:
        self._ids = frozenset(params.stop_token_ids)
        self._strings = params.stop_strings
        self._decode = decode
        # A token is at least one byte of text, so a string lies within that many tokens.
        longest = max((len(text.encode()) for text in self._strings), default=0)
        self._window: deque[int] = deque(maxlen=longest + self._SPARE_TOKENS)

    def ends(self, token: int) -> bool:
        """Whether the sample ends with ``token``, which is kept."""
        if token in self._ids:
            return True
        if not self._strings:
            return False
        self._window.append(token)
        text = self._decode(list(self._window))
        return any(string in text for string in self._strings)
