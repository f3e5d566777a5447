"""Samples as the JSON of OpenAI's two endpoints, whole or in chunks.

Knows both shapes, where text is cut, and usage. Does not know HTTP or how tokens come in.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any, Protocol

from twinkle_serve.gateway.openai.tokenizer import ModelText
from twinkle_serve.protocol.data import SampleDelta, SampledSequence, SampleResult
from twinkle_serve.protocol.openai import finite

Drawn = SampledSequence | SampleDelta


class Shape(Protocol):
    """One of the two endpoints' JSON. ``logprobs`` of a choice: what ``token_logprobs`` made, or None."""

    kind: str
    chunk_kind: str
    prefix: str

    def choice(self, index: int, text: str, logprobs: Any, finish: str | None) -> dict[str, Any]: ...

    def chunk(self, index: int, text: str, logprobs: Any, finish: str | None) -> dict[str, Any]: ...

    def opening(self, index: int) -> dict[str, Any] | None:
        """What a stream says before the first text of a choice."""
        ...

    def logprobs(self, text: ModelText, drawn: Drawn, count: int, offset: int) -> Any:
        """Of the first ``count`` tokens of ``drawn``, before which a choice had ``offset`` characters."""
        ...


class ChatShape:
    kind, chunk_kind, prefix = "chat.completion", "chat.completion.chunk", "chatcmpl-"

    def choice(self, index: int, text: str, logprobs: Any, finish: str | None) -> dict[str, Any]:
        message = {"role": "assistant", "content": text, "refusal": None}
        return {"index": index, "message": message, "logprobs": logprobs, "finish_reason": finish}

    def chunk(self, index: int, text: str, logprobs: Any, finish: str | None) -> dict[str, Any]:
        delta = {"content": text} if text or finish is None else {}
        return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish}

    def opening(self, index: int) -> dict[str, Any] | None:
        delta = {"role": "assistant", "content": ""}
        return {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}

    def logprobs(self, text: ModelText, drawn: Drawn, count: int, offset: int) -> Any:
        content = []
        for row in range(count):
            entry = _entry(text, drawn.tokens[row], drawn.logprobs[row])
            entry["top_logprobs"] = [_entry(text, *pair) for pair in _alternatives(drawn, row)]
            content.append(entry)
        return {"content": content, "refusal": None}


class TextShape:
    kind, chunk_kind, prefix = "text_completion", "text_completion", "cmpl-"

    def choice(self, index: int, text: str, logprobs: Any, finish: str | None) -> dict[str, Any]:
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": finish}

    def chunk(self, index: int, text: str, logprobs: Any, finish: str | None) -> dict[str, Any]:
        return self.choice(index, text, logprobs, finish)

    def opening(self, index: int) -> dict[str, Any] | None:
        return None

    def logprobs(self, text: ModelText, drawn: Drawn, count: int, offset: int) -> Any:
        pieces = [text.decode([token], special=True) for token in drawn.tokens[:count]]
        offsets = list(accumulate(map(len, pieces), initial=offset))[:count]
        tops = [_by_text(text, _alternatives(drawn, row)) for row in range(count)]
        return {
            "tokens": pieces,
            "token_logprobs": [finite(float(logprob)) for logprob in drawn.logprobs[:count]],
            "top_logprobs": tops if drawn.topk is not None else None,
            "text_offset": offsets,
        }


def _entry(text: ModelText, token: Any, logprob: Any) -> dict[str, Any]:
    piece = text.decode([token], special=True)
    return {"token": piece, "logprob": finite(float(logprob)), "bytes": list(text.bytes_of(int(token)))}


def _by_text(text: ModelText, pairs: Sequence[tuple[Any, Any]]) -> dict[str, float]:
    """Logprobs by what tokens read as. Parts of characters all read alike, so their bytes are written, as
    OpenAI does; of tokens that still read alike the likeliest stands."""
    told: dict[str, float] = {}
    for token, logprob in pairs:
        piece = text.decode([token], special=True)
        if "\N{REPLACEMENT CHARACTER}" in piece:
            piece = "bytes:" + "".join(f"\\x{byte:02x}" for byte in text.bytes_of(int(token)))
        told.setdefault(piece, finite(float(logprob)))
    return told


def _alternatives(drawn: Drawn, row: int) -> list[tuple[Any, Any]]:
    if drawn.topk is None:
        return []
    return list(zip(drawn.topk.token_ids[row], drawn.topk.logprobs[row], strict=True))


@dataclass(frozen=True, slots=True)
class Answer:
    """One response in the making: what all its parts repeat. ``wants_logprobs``: choices tell them."""

    shape: Shape
    model: str
    text: ModelText
    eos_token_ids: Sequence[int]
    stops: Sequence[str]
    wants_logprobs: bool
    request_id: str
    created: int = field(default_factory=lambda: int(time.time()))

    def whole(self, results: Sequence[SampleResult], num_prompt_tokens: Sequence[int]) -> dict[str, Any]:
        """``results``: one of each prompt; choices are numbered through."""
        sequences = [sequence for result in results for sequence in result.sequences]
        choices = [self._choice(index, sequence) for index, sequence in enumerate(sequences)]
        usage = self.usage(results, num_prompt_tokens)
        return self._head(self.shape.kind) | {"choices": choices, "usage": usage}

    def chunk(self, choices: Sequence[dict[str, Any]], usage: dict[str, Any] | None = None) -> dict[str, Any]:
        return self._head(self.shape.chunk_kind) | {"choices": list(choices), "usage": usage}

    def usage(self, results: Sequence[SampleResult], num_prompt_tokens: Sequence[int]) -> dict[str, Any]:
        prompt = sum(num_prompt_tokens)
        drawn = sum(len(sequence.tokens) for result in results for sequence in result.sequences)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": drawn,
            "total_tokens": prompt + drawn,
            "prompt_tokens_details": {"cached_tokens": sum(r.prompt_cache_hit_tokens for r in results)},
        }

    def num_shown(self, tokens: Sequence[int]) -> int:
        """How many of a sample's tokens are told: not the one that ended it."""
        ended = len(tokens) > 0 and int(tokens[-1]) in self.eos_token_ids
        return len(tokens) - ended

    def full_text(self, tokens: Sequence[int]) -> str:
        """What a sample says: without the token that ended it, and cut where the first stop string begins."""
        text = self.text.decode([int(token) for token in tokens[: self.num_shown(tokens)]])
        cuts = [at for at in map(text.find, self.stops) if at >= 0]
        return text[: min(cuts)] if cuts else text

    def logprobs(self, drawn: Drawn, offset: int = 0) -> Any:
        if not self.wants_logprobs:
            return None
        return self.shape.logprobs(self.text, drawn, self.num_shown(drawn.tokens.tolist()), offset)

    def _choice(self, index: int, sequence: SampledSequence) -> dict[str, Any]:
        text = self.full_text(sequence.tokens.tolist())
        return self.shape.choice(index, text, self.logprobs(sequence), sequence.stop_reason)

    def _head(self, kind: str) -> dict[str, Any]:
        return {
            "id": f"{self.shape.prefix}{self.request_id}",
            "object": kind,
            "created": self.created,
            "model": self.model,
        }
