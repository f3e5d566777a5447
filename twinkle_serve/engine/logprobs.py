"""The unembedding: log-probabilities of given tokens, chunk by chunk, and logits for sampling.

Only a chunk of logits is alive at a time; what is kept for backward is the hidden states and two numbers a
row. Log-softmax is float32 whatever the base model's type. Knows hidden states, the unembedding and the
segments with LoRA on it; does not know losses (losses.py), requests or how tokens are drawn (draw.py).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch.autograd.function import once_differentiable

from twinkle_serve.engine.frozen import packed, product, product_back
from twinkle_serve.engine.layout import ALIGNMENT
from twinkle_serve.engine.slots import Segment

CHUNK_TOKENS = 256
CACHE_BYTES = 256 * 2**20
"""Forward keeps the whole float32 [rows, vocab] for backward when it is no larger than this, in bytes: that
saves a third of the head's arithmetic for small batches."""

Indices = npt.NDArray[np.int64]


class HeadSegment(NamedTuple):
    """Rows ``start:end`` have LoRA on the unembedding: A ``[r, H]``, B transposed ``[r, V]``, both float32.

    grad_a, grad_b_t: where backward adds the factors' gradients; None for a frozen adapter, whose rows then
    still pass their gradient on to the hidden states.
    """

    start: int
    end: int
    a: torch.Tensor
    b_t: torch.Tensor
    scale: float
    grad_a: torch.Tensor | None = None
    grad_b_t: torch.Tensor | None = None

    @classmethod
    def of(cls, segments: Iterable[Segment], target_index: int) -> list[HeadSegment]:
        """The segments of packed rows, seen by the unembedding, which is target ``target_index``."""
        found = []
        for adapter, start, end in segments:
            layout, target = adapter.layout, adapter.layout.targets[target_index]
            # The head is float32 whatever the base model is, so it takes the weights themselves.
            a, b_t = layout.a(adapter.weights, target), layout.b_t(adapter.weights, target)
            factors = adapter.factors(target_index)
            found.append(cls(start, end, a, b_t, adapter.scale, factors.grad_a, factors.grad_b_t))
        return found


def target_logprobs(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    segments: Sequence[HeadSegment],
    rows: torch.Tensor,
    targets: torch.Tensor,
    *,
    chunk_tokens: int = CHUNK_TOKENS,
    isolated: bool = True,
    cache_bytes: int = CACHE_BYTES,
) -> torch.Tensor:
    """float32 [M]: log p(targets[m] | hidden[rows[m]]).

    hidden: [T, H] in the base model's type. It must require grad if gradients are wanted, also for those of
    the adapters alone: backward adds these to ``grad_a`` and ``grad_b_t`` of the segments.
    weight, bias: the frozen unembedding, [V, H] and [V]. segments: ascending and disjoint; rows between them
    belong to the base model alone.
    rows: int64 [M], ascending; a row may come several times ([N, K] targets) or not at all. On the CPU they
    cost a GPU no wait. targets: int64 [M], each in [0, V).
    chunk_tokens: rows of logits alive at once.
    isolated: no chunk crosses the edge of a segment, so a segment's numbers are bitwise those it has alone.
    Otherwise neighbours share matrix products, which is faster when segments are short and changes at most
    the rounding.
    """
    if rows.numel() == 0:
        return hidden.new_zeros(0, dtype=torch.float32)
    elements = _Elements.of(rows.cpu().numpy())
    backward = torch.is_grad_enabled() and hidden.requires_grad
    keep = backward and elements.positions.size * weight.shape[0] * 4 <= cache_bytes
    head = _Head(weight, bias, segments, chunk_tokens, isolated)
    result: torch.Tensor = _TargetLogprobs.apply(hidden, head, elements, targets.to(hidden.device), keep)
    return result


def full_logits(
    hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, segments: Sequence[HeadSegment]
) -> torch.Tensor:
    """float32 [T, V]: all logits of a few rows, for sampling. No gradient; rows share matrix products."""
    num_rows = hidden.shape[0]
    head = _Head(weight, bias, segments, max(1, num_rows), isolated=False)
    logits = hidden.new_empty(num_rows, weight.shape[0], dtype=torch.float32)
    with torch.no_grad():
        for chunk in _chunks(np.arange(num_rows), head):
            _logits(hidden, head, chunk, logits)
    return logits


def top_k_logprobs(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    segments: Sequence[HeadSegment],
    k: int,
    *,
    chunk_tokens: int = CHUNK_TOKENS,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The k likeliest tokens of each row and their logprobs, best first: int64 and float32 [T, min(k, V)]."""
    num_rows, vocab_size = hidden.shape[0], weight.shape[0]
    head = _Head(weight, bias, segments, chunk_tokens, isolated=True)
    token_ids = torch.empty(num_rows, min(k, vocab_size), dtype=torch.int64, device=hidden.device)
    logprobs = hidden.new_empty(token_ids.shape, dtype=torch.float32)
    workspace = _Workspace(hidden, vocab_size)
    with torch.no_grad():
        for chunk in _chunks(np.arange(num_rows), head):
            rows = slice(chunk.start, chunk.end)
            logits = _logits(hidden[rows], head, chunk, workspace.rows(chunk))
            best, token_ids[rows] = logits.topk(token_ids.shape[1], dim=1)
            # Shifted by the largest logit, as the softmax is, so that a likely token's logprob stays exact.
            shift = best[:, :1]
            normalizer = logits.sub_(shift).exp_().sum(dim=1, keepdim=True).log_()
            logprobs[rows] = best - shift - normalizer
    return token_ids, logprobs


class _Head(NamedTuple):
    """What turns hidden states into logits, and in which pieces; see ``target_logprobs``."""

    weight: torch.Tensor
    bias: torch.Tensor | None
    segments: Sequence[HeadSegment]
    chunk_tokens: int
    isolated: bool


class _Elements(NamedTuple):
    """Targets by position: position p of ``positions`` has the elements where ``owner == p``.

    positions: distinct rows of the hidden states, ascending. owner: [M] index into positions, ascending.
    """

    positions: Indices
    owner: Indices

    @classmethod
    def of(cls, rows: Indices) -> _Elements:
        steps = np.diff(rows)
        assert (steps >= 0).all(), "rows must ascend"
        owner = np.concatenate([[0], np.cumsum(steps > 0)])
        return cls(rows[np.concatenate([[True], steps > 0])], owner)

    @property
    def one_each(self) -> bool:
        return self.owner.size == self.positions.size

    def of_rows(self, chunk: _Chunk) -> slice:
        """The elements of the positions in a chunk."""
        first, last = np.searchsorted(self.owner, [chunk.start, chunk.end])
        return slice(int(first), int(last))

    def only(self, wanted: npt.NDArray[np.bool_]) -> tuple[Indices, Indices, _Elements]:
        """The positions that own a wanted element: their indices, those of all their elements, and both."""
        active = np.bincount(self.owner, weights=wanted, minlength=self.positions.size) > 0
        kept, elements = np.flatnonzero(active), np.flatnonzero(active[self.owner])
        renumbered = np.cumsum(active) - 1
        return kept, elements, _Elements(self.positions[kept], renumbered[self.owner[elements]])


class _Part(NamedTuple):
    """Rows ``start:end`` of a chunk have this segment's LoRA."""

    segment: HeadSegment
    start: int
    end: int


class _Chunk(NamedTuple):
    """Positions ``start:end`` are computed together."""

    start: int
    end: int
    parts: list[_Part]


def _chunks(positions: Indices, head: _Head) -> Iterator[_Chunk]:
    """Cut ascending positions into chunks of about equal size, at most ``chunk_tokens`` each."""
    edges = np.array([(s.start, s.end) for s in head.segments], dtype=np.int64).reshape(-1, 2)
    stretches = np.searchsorted(positions, edges).tolist()
    cuts = [0, positions.size]
    if head.isolated:
        cuts = sorted({*cuts, *(edge for stretch in stretches for edge in stretch)})
    owned = list(zip(head.segments, stretches, strict=True))
    for first, last in pairwise(cuts):
        # Equal chunks, not full ones and a rest: small matrix products are slow.
        num_chunks = -(-(last - first) // head.chunk_tokens)
        bounds = [first + (last - first) * i // num_chunks for i in range(num_chunks + 1)]
        for start, end in pairwise(bounds):
            parts = [
                _Part(segment, max(low, start) - start, min(high, end) - start)
                for segment, (low, high) in owned
                if max(low, start) < min(high, end)
            ]
            yield _Chunk(start, end, parts)


class _Workspace:
    """Memory for one chunk of logits, used again for every chunk: fresh pages cost as much as a softmax."""

    def __init__(self, like: torch.Tensor, vocab_size: int) -> None:
        self._like = like
        self._vocab_size = vocab_size
        self._buffer = _aligned_rows(like, 0, vocab_size)

    def rows(self, chunk: _Chunk) -> torch.Tensor:
        num_rows = chunk.end - chunk.start
        if self._buffer.shape[0] < num_rows:
            self._buffer = _aligned_rows(self._like, num_rows, self._vocab_size)
        return self._buffer[:num_rows]


def _aligned_rows(like: torch.Tensor, num_rows: int, vocab_size: int) -> torch.Tensor:
    """Uninitialised float32 [num_rows, vocab_size] whose every row begins on a 64-byte boundary.

    Matrix products round differently for differently aligned memory, and a chunk's rows must not depend on
    what comes before them.
    """
    stride = -(-vocab_size // ALIGNMENT) * ALIGNMENT
    return like.new_empty(num_rows, stride, dtype=torch.float32)[:, :vocab_size]


def _take(tensor: torch.Tensor, indices: Indices) -> torch.Tensor:
    """Rows of a tensor at ascending indices; a view where they are consecutive."""
    first, last = int(indices[0]), int(indices[-1])
    if last - first == indices.size - 1:
        return tensor[first : last + 1]
    return tensor.index_select(0, torch.from_numpy(indices).to(tensor.device))


def _logits(x: torch.Tensor, head: _Head, chunk: _Chunk, out: torch.Tensor) -> torch.Tensor:
    """float32 logits [c, V] of a chunk's hidden states [c, H], written to ``out``."""
    weight, bias = head.weight, head.bias
    if weight.dtype == torch.float32:
        if packed(weight) is None:
            torch.mm(x, weight.t(), out=out)
        else:
            out.copy_(product(x, weight))
    elif weight.is_cuda:
        # Products of bfloat16 are summed in float32 anyway: this only keeps them from being rounded again.
        torch.mm(x, weight.t(), out_dtype=torch.float32, out=out)
    else:
        out.copy_(x @ weight.t())
    if bias is not None:
        out.add_(bias)
    for segment, start, end in chunk.parts:
        low_rank = x[start:end].float() @ segment.a.t()
        out[start:end].addmm_(low_rank, segment.b_t, alpha=segment.scale)
    return out


class _TargetLogprobs(torch.autograd.Function):
    """logprob[m] = logits[rows[m], targets[m]] - logsumexp(logits[rows[m]])."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        head: _Head,
        elements: _Elements,
        targets: torch.Tensor,
        keep_exponentials: bool,
    ) -> torch.Tensor:
        num_rows, vocab_size = elements.positions.size, head.weight.shape[0]
        logprobs = hidden.new_empty(targets.shape, dtype=torch.float32)
        shift = hidden.new_empty(num_rows, dtype=torch.float32)
        total = hidden.new_empty(num_rows, dtype=torch.float32)
        workspace = _Workspace(hidden, vocab_size)
        kept = _aligned_rows(hidden, num_rows, vocab_size) if keep_exponentials else None
        owner = torch.from_numpy(elements.owner).to(hidden.device)
        for chunk in _chunks(elements.positions, head):
            rows, chosen = slice(chunk.start, chunk.end), elements.of_rows(chunk)
            out = workspace.rows(chunk) if kept is None else kept[rows]
            x = _take(hidden, elements.positions[rows])
            logits = _logits(x, head, chunk, out)
            picked = logits[owner[chosen] - chunk.start, targets[chosen]]
            shift[rows] = logits.amax(dim=1)
            logits.sub_(shift[rows, None]).exp_()
            total[rows] = logits.sum(dim=1)
            # Subtracted one after the other: their sum would round away the digits of likely tokens.
            logprobs[chosen] = picked - shift[owner[chosen]] - total[owner[chosen]].log()
        ctx.save_for_backward(hidden, targets, shift, total)
        ctx.head, ctx.elements, ctx.kept = head, elements, kept
        return logprobs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        hidden, targets, shift, total = ctx.saved_tensors
        head: _Head = ctx.head
        kept, ctx.kept = ctx.kept, None  # consumed: a second backward computes them again
        active, chosen, elements = ctx.elements.only((grad != 0).cpu().numpy())
        d_hidden = torch.zeros_like(hidden)
        if active.size == 0:
            return d_hidden, None, None, None, None
        grad, targets = _take(grad, chosen), _take(targets, chosen)
        workspace = _Workspace(hidden, head.weight.shape[0])
        for chunk in _chunks(elements.positions, head):
            rows, own = active[chunk.start : chunk.end], elements.of_rows(chunk)
            x = _take(hidden, elements.positions[chunk.start : chunk.end])
            if kept is None:
                exponentials = _logits(x, head, chunk, workspace.rows(chunk))
                exponentials.sub_(_take(shift, rows)[:, None]).exp_()
            else:
                exponentials = _take(kept, rows)
            owner = torch.from_numpy(elements.owner[own] - chunk.start).to(hidden.device)
            d_logits = _d_logits(exponentials, _take(total, rows), owner, targets[own], grad[own])
            dx = _d_chunk(x, d_logits, head, chunk)
            positions = elements.positions[chunk.start : chunk.end]
            d_hidden[torch.from_numpy(positions).to(hidden.device)] = dx
        return d_hidden, None, None, None, None


def _d_logits(
    exponentials: torch.Tensor,
    total: torch.Tensor,
    owner: torch.Tensor,
    targets: torch.Tensor,
    grad: torch.Tensor,
) -> torch.Tensor:
    """Gradient of sum(grad * logprobs) by a chunk's logits, in the memory of ``exponentials`` [c, V].

    The softmax of row i is exponentials[i] / total[i]; element m belongs to row owner[m].
    """
    # index_put_ and not index_add_: it adds in a fixed order on a GPU too.
    grad_sum = torch.zeros_like(total).index_put_((owner,), grad, accumulate=True)
    d_logits = exponentials.mul_((-grad_sum / total)[:, None])
    return d_logits.index_put_((owner, targets), grad, accumulate=True)


def _d_chunk(x: torch.Tensor, d_logits: torch.Tensor, head: _Head, chunk: _Chunk) -> torch.Tensor:
    """Gradient by a chunk's hidden states [c, H]; those of the LoRA factors are added to their buffers."""
    dx = product_back(d_logits.to(x.dtype), head.weight)
    for segment, start, end in chunk.parts:
        d_part, x_part, scale = d_logits[start:end], x[start:end].float(), segment.scale
        d_low_rank = d_part @ segment.b_t.t()
        if segment.grad_a is not None and segment.grad_b_t is not None:
            low_rank = x_part @ segment.a.t()
            segment.grad_b_t.addmm_(low_rank.t(), d_part, alpha=scale)
            segment.grad_a.addmm_(d_low_rank.t(), x_part, alpha=scale)
        if dx.dtype == torch.float32:
            dx[start:end].addmm_(d_low_rank, segment.a, alpha=scale)
        else:
            dx[start:end].add_(d_low_rank @ segment.a, alpha=scale)
    return dx
