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
"""Tokens sorted to be cut by top_k and top_p; a row whose nucleus is wider sorts more, and then more."""

_EMPTY_CELL = (0, -99999.0)


class DrawParams(NamedTuple):
    """How one row's next token is drawn; ``uniform`` in [0, 1) is the row's random number."""

    temperature: float
    top_k: int
    top_p: float
    uniform: float

    @classmethod
    def of(cls, params: SamplingParams, seed: int, index: int, position: int) -> DrawParams:
        """Parameters of the token at ``position`` (0 is the first one generated) of sample ``index``."""
        uniform = 0.0 if params.temperature == 0 else uniform_number(seed, index, position)
        return cls(params.temperature, params.top_k, params.top_p, uniform)

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


def uniform_number(seed: int, index: int, position: int) -> float:
    """A number in [0, 1) from a hash, so that streams need no state and are the same in any batch."""
    key = struct.pack("<QQQ", seed % 2**64, index, position)
    return (int.from_bytes(blake2b(key, digest_size=8).digest(), "little") >> 11) / 2**53


def draw_tokens(logits: torch.Tensor, params: Sequence[DrawParams], topk: int = 0) -> Drawn:
    """One token for each row of ``logits``, float32 [B, V], which is overwritten.

    Logprobs, those of the ``topk`` best tokens too, are under the distribution at the row's temperature,
    before top_k and top_p cut it; at temperature 0, under that at temperature 1.
    """
    assert len(params) == logits.shape[0]
    temperatures = [1.0 if p.temperature == 0 else p.temperature for p in params]
    logits -= logits.amax(dim=1, keepdim=True)  # before dividing: a tiny temperature must not overflow
    logits /= torch.tensor(temperatures, dtype=torch.float32, device=logits.device)[:, None]
    probabilities = logits.exp()
    sums = _block_sums(probabilities)
    normalizer = sums.sum(dim=1).log()
    tokens = torch.empty(logits.shape[0], dtype=torch.int64, device=logits.device)
    for draw, rows in _by_method(params):
        index = torch.tensor(rows, device=logits.device)
        own = [params[row] for row in rows]
        if len(own) == len(params):
            tokens = draw(logits, probabilities, sums, own)
        else:
            tokens[index] = draw(logits[index], probabilities[index], sums[index], own)
    logprobs = (logits.gather(1, tokens[:, None]).squeeze(1).double() - normalizer).float()
    return Drawn(tokens, logprobs, _top_k(logits, normalizer, topk) if topk > 0 else None)


_Method = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, list[DrawParams]], torch.Tensor]
"""(scaled logits [b, V], unnormalised probabilities [b, V], their block sums, params) -> tokens [b]."""


def _by_method(params: Sequence[DrawParams]) -> list[tuple[_Method, list[int]]]:
    greedy = [row for row, p in enumerate(params) if p.temperature == 0]
    whole = [row for row, p in enumerate(params) if p.temperature > 0 and not p.truncated]
    truncated = [row for row, p in enumerate(params) if p.temperature > 0 and p.truncated]
    groups: list[tuple[_Method, list[int]]] = [(_greedy, greedy), (_whole, whole), (_truncated, truncated)]
    return [(method, rows) for method, rows in groups if rows]


def _greedy(
    logits: torch.Tensor, probabilities: torch.Tensor, sums: torch.Tensor, params: list[DrawParams]
) -> torch.Tensor:
    return logits.argmax(dim=1)


def _whole(
    logits: torch.Tensor, probabilities: torch.Tensor, sums: torch.Tensor, params: list[DrawParams]
) -> torch.Tensor:
    """Invert the cumulative distribution: first which block the number falls into, then which token."""
    vocab_size = probabilities.shape[1]
    block, rest = _invert(sums, _uniforms(params, sums.device) * sums.sum(dim=1))
    offsets = torch.arange(_BLOCK, device=sums.device)
    members = (block[:, None] * _BLOCK + offsets).clamp(max=vocab_size - 1)
    inside = probabilities.gather(1, members).double()
    inside[block[:, None] * _BLOCK + offsets >= vocab_size] = 0
    token, _ = _invert(inside, rest)
    return block * _BLOCK + token


def _truncated(
    logits: torch.Tensor,
    probabilities: torch.Tensor,
    sums: torch.Tensor,
    params: list[DrawParams],
    num_candidates: int = _CANDIDATES,
) -> torch.Tensor:
    """The likeliest tokens, best first, cut by top_k and then by top_p, and one of them drawn."""
    vocab_size, device = logits.shape[1], logits.device
    limits = [min(p.top_k, vocab_size) if p.top_k > 0 else vocab_size for p in params]
    width = min(max(limits), num_candidates)
    top_k = torch.tensor(limits, device=device)
    top_p = torch.tensor([p.top_p for p in params], dtype=torch.float64, device=device)
    best, token_ids = probabilities.topk(width, dim=1)
    best = best.double()
    best[:, 1:].masked_fill_(torch.arange(1, width, device=device) >= top_k[:, None], 0)
    # top_p is a share of what top_k leaves; a row that top_k does not cut here has its whole mass.
    cumulative = best.cumsum(dim=1)
    nucleus = top_p * torch.where(top_k <= width, cumulative[:, -1], sums.sum(dim=1))
    best[:, 1:].masked_fill_(cumulative[:, :-1] >= nucleus[:, None], 0)
    place, _ = _invert(best, _uniforms(params, device) * best.sum(dim=1))
    tokens = token_ids.gather(1, place[:, None]).squeeze(1)
    if width < max(limits):
        wider = ((top_k > width) & (cumulative[:, -1] < nucleus)).nonzero().squeeze(1)
        if wider.numel():
            own = [params[row] for row in wider.tolist()]
            more = num_candidates * 16
            tokens[wider] = _truncated(logits[wider], probabilities[wider], sums[wider], own, more)
    return tokens


def _uniforms(params: list[DrawParams], device: torch.device) -> torch.Tensor:
    return torch.tensor([p.uniform for p in params], dtype=torch.float64, device=device)


def _block_sums(probabilities: torch.Tensor) -> torch.Tensor:
    """float64 [B, ceil(V / 512)]: sums of blocks of tokens, the same for a row in any batch."""
    num_rows, vocab_size = probabilities.shape
    whole = vocab_size - vocab_size % _BLOCK
    parts = [probabilities[:, :whole].reshape(num_rows, -1, _BLOCK).sum(dim=2).double()]
    if whole < vocab_size:
        parts.append(probabilities[:, whole:].sum(dim=1, keepdim=True).double())
    return torch.cat(parts, dim=1)


def _invert(masses: torch.Tensor, target: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The first index of each row whose cumulative mass exceeds ``target``, and how much of the target lies
    inside it. Never an index without mass, however the sums were rounded."""
    cumulative = masses.cumsum(dim=1)
    index = (cumulative <= target[:, None]).sum(dim=1)
    last = masses.shape[1] - 1 - (masses > 0).flip(1).int().argmax(dim=1)
    index = torch.minimum(index, last)[:, None]
    before = cumulative.gather(1, index) - masses.gather(1, index)
    return index.squeeze(1), (target - before.squeeze(1)).clamp(min=0)


def _top_k(logits: torch.Tensor, normalizer: torch.Tensor, k: int) -> TopK:
    best, token_ids = logits.topk(min(k, logits.shape[1]), dim=1)
    logprobs = (best.double() - normalizer[:, None]).float()
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
