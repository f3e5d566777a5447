"""A sample that grows, as the choices of a stream's chunks.

Knows that text which may yet turn out to be the beginning of a stop string, or of a character, has to wait.
Does not know HTTP or where deltas come from.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from twinkle_serve.gateway.openai.answers import Answer
from twinkle_serve.protocol.data import SampleDelta, SampledSequence, SampleResult, TopK


class Chunks:
    """The choices of one streamed answer."""

    def __init__(self, answer: Answer) -> None:
        self._answer = answer
        self._growing: dict[int, _Growing] = {}

    def grow(self, deltas: Iterable[SampleDelta]) -> list[dict[str, Any]]:
        """Choices for what the deltas add; none if all of it has to wait."""
        return [choice for delta in deltas for choice in self._of(delta.index).grow(delta)]

    def end(self, result: SampleResult) -> list[dict[str, Any]]:
        """Choices for what was not told yet, and each one's finish_reason."""
        return [
            choice
            for index, sequence in enumerate(result.sequences)
            for choice in self._of(index).end(sequence)
        ]

    def _of(self, index: int) -> _Growing:
        return self._growing.setdefault(index, _Growing(self._answer, index))


class _Growing:
    """One choice: ``text`` has been decoded, of which ``num_sent`` characters were sent."""

    def __init__(self, answer: Answer, index: int) -> None:
        self._answer = answer
        self._index = index
        self._stream = answer.text.stream()
        self._text = ""
        self._num_sent = 0
        self._num_tokens = 0
        self._offset = 0
        self._is_open = False

    def grow(self, delta: SampleDelta) -> list[dict[str, Any]]:
        self._num_tokens += len(delta.tokens)
        tokens = delta.tokens.tolist()
        self._text += self._stream.push(tokens[: self._answer.num_shown(tokens)])
        ready = len(self._text) - _held_back(self._text, self._answer.stops)
        text, logprobs = self._text[self._num_sent : ready], self._logprobs(delta)
        self._num_sent = max(self._num_sent, ready)
        if not text and logprobs is None:
            return []
        return [*self._opening(), self._answer.shape.chunk(self._index, text, logprobs, None)]

    def end(self, sequence: SampledSequence) -> list[dict[str, Any]]:
        text = self._answer.full_text(sequence.tokens.tolist())[self._num_sent :]
        rest = _after(sequence, self._num_tokens, self._index)
        logprobs = self._logprobs(rest) if len(rest.tokens) else None
        shape = self._answer.shape
        choices = self._opening()
        if text or logprobs is not None:
            choices.append(shape.chunk(self._index, text, logprobs, None))
        return [*choices, shape.chunk(self._index, "", None, sequence.stop_reason)]

    def _logprobs(self, drawn: SampleDelta) -> Any:
        found = self._answer.logprobs(drawn, self._offset)
        if found is not None:
            self._offset += sum(map(len, found.get("tokens", ())))
        return found

    def _opening(self) -> list[dict[str, Any]]:
        opening = None if self._is_open else self._answer.shape.opening(self._index)
        self._is_open = True
        return [] if opening is None else [opening]


def _held_back(text: str, stops: Sequence[str]) -> int:
    """How many characters at the end must wait: from where a stop string is, or may be about to be."""
    cuts = [at for at in map(text.find, stops) if at >= 0]
    if cuts:
        return len(text) - min(cuts)
    longest = 0
    for stop in stops:
        for size in range(min(len(stop) - 1, len(text)), longest, -1):
            if text.endswith(stop[:size]):
                longest = size
                break
    return longest


def _after(sequence: SampledSequence, start: int, index: int) -> SampleDelta:
    topk = sequence.topk
    rest = None if topk is None else TopK(topk.token_ids[start:], topk.logprobs[start:])
    return SampleDelta(index, np.asarray(sequence.tokens[start:]), sequence.logprobs[start:], rest)
