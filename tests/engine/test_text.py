"""The tokenizer of a base model: found, or said to be missing."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from twinkle_serve.engine.text import TokenText


def test_tokens_become_the_text_that_they_were_made_of(tiny_moe: Path) -> None:
    from transformers import AutoTokenizer

    text = TokenText(tiny_moe)
    text.load()
    assert text.decode(AutoTokenizer.from_pretrained(tiny_moe).encode("and so on")) == "and so on"


@pytest.mark.parametrize("model", ["tiny_moe", "tiny_llama"])
def test_a_directory_without_a_tokenizer_is_said_to_have_none(
    model: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    """For the first of these transformers makes an empty one, whose text no stop string is ever in."""
    shutil.copy(request.getfixturevalue(model) / "config.json", tmp_path)
    with pytest.raises(ValueError, match="this base model has none"):
        TokenText(tmp_path).load()
