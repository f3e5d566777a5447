"""Both languages have every word, with the same blanks."""

from __future__ import annotations

import string

import pytest

from twinkle_serve.console.render import moment, number, size
from twinkle_serve.console.texts import TEXTS, choose_language, translator


def blanks(text: str) -> set[str]:
    return {name for _, name, _, _ in string.Formatter().parse(text) if name is not None}


@pytest.mark.parametrize("key", TEXTS)
def test_both_languages_say_the_same(key: str) -> None:
    english, chinese = TEXTS[key]
    assert english.strip()
    assert chinese.strip()
    assert blanks(english) == blanks(chinese)


def test_a_word_that_is_missing_is_a_bug() -> None:
    with pytest.raises(KeyError):
        translator("en")("no_such_word")


@pytest.mark.parametrize(
    ("asked", "accepted", "expected"),
    [
        (None, None, "en"),
        (None, "zh-CN,zh;q=0.9,en;q=0.8", "zh"),
        (None, "fr-FR, en;q=0.5", "en"),
        ("zh", "en", "zh"),
        ("xx", "zh", "zh"),
        (None, ";;,", "en"),
    ],
)
def test_the_language_is_the_visitors(asked: str | None, accepted: str | None, expected: str) -> None:
    assert choose_language(asked, accepted) == expected


@pytest.mark.parametrize(
    ("value", "text"), [(None, "–"), (1234567, "1,234,567"), (2.0, "2"), (0.000123456, "0.0001235")]
)
def test_numbers(value: float | None, text: str) -> None:
    assert number(value) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [(None, "–"), (0, "0 B"), (999, "999 B"), (123_456, "123 kB"), (2.5e9, "2.5 GB"), (5e15, "5e+03 TB")],
)
def test_sizes(value: float | None, text: str) -> None:
    assert size(value) == text


def test_moments_are_utc() -> None:
    assert moment("2026-01-02T03:04:05+08:00") == "2026-01-01 19:04 UTC"
    assert moment(None) == "–"
