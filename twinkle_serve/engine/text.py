"""Token ids to text, for stop strings only.

Knows the tokenizer in the base model's directory. Everything else in the engine works on token ids.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

_MISSING = "stop strings need a tokenizer and this base model has none"


class TokenText:
    """The tokenizer, loaded when the first stop string asks for it."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._tokenizer: Any = None

    def load(self) -> None:
        """Raises ValueError if the model directory has no tokenizer."""
        if self._tokenizer is not None:
            return
        from transformers import AutoTokenizer

        try:
            found: Any = AutoTokenizer.from_pretrained(self._directory)
        except (OSError, ValueError) as error:
            raise ValueError(_MISSING) from error
        # For some models transformers makes an empty one where there are no files, of special tokens only.
        if len(found) == len(found.get_added_vocab()):
            raise ValueError(_MISSING)
        self._tokenizer = found

    def decode(self, token_ids: Sequence[int]) -> str:
        return str(self._tokenizer.decode(list(token_ids), skip_special_tokens=False))
