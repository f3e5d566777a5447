"""Lists and objects of wrong items in the fields of every request."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from pydantic import ValidationError

from twinkle_serve.gateway import insights
from twinkle_serve.protocol import openai, sample
from twinkle_serve.protocol import requests as wire
from twinkle_serve.protocol.errors import UserError
from twinkle_serve.protocol.requests import Lenient, read

MODULES = openai, sample, insights, wire  # that have requests of their own
MANY = 20_000
FILLINGS: dict[str, Any] = {
    "numbers": [1] * MANY,
    "texts": ["x"] * MANY,
    "objects": [{}] * MANY,
    "lists": [[]] * MANY,
    "wrong lists": [["x"] * MANY],
    "wrong at the end": [*[1] * MANY, "x"],
    "an object of numbers": {str(index): 1 for index in range(MANY)},
    "an object of lists": {str(index): [] for index in range(MANY)},
}


def all_requests(base: type[Lenient] = Lenient) -> Iterator[type[Lenient]]:
    for model in base.__subclasses__():
        yield model
        yield from all_requests(model)


def num_errors(model: type[Lenient], body: dict[str, Any]) -> int:
    try:
        model.model_validate(body)
    except ValidationError as error:
        return error.error_count()
    return 0


@pytest.mark.parametrize("filling", FILLINGS)
@pytest.mark.parametrize("model", [*all_requests()], ids=lambda model: model.__name__)
def test_an_error_for_each_of_many_items_is_not_collected(model: type[Lenient], filling: str) -> None:
    """They would take a hundred times the memory of the body, and a thread that nobody can interrupt."""
    for name in model.model_fields:
        assert num_errors(model, {name: FILLINGS[filling]}) < len(model.model_fields) + 10, name


@pytest.mark.parametrize("filling", [{"prompt": ["x"] * 2049}, {"prompt": [[1]] * 2049}])
def test_prompts_are_counted_before_they_are_read(filling: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=r"prompt.*at most 2048 items"):
        read(openai.Completion, {"model": "m"} | filling)


def test_messages_are_counted_before_they_are_read() -> None:
    with pytest.raises(UserError, match="messages: List should have at most 16384 items"):
        read(openai.Chat, {"model": "m", "messages": [{"role": "u"}] * 16_385})


def test_metadata_to_search_for_must_be_texts() -> None:
    with pytest.raises(UserError, match=r"user_metadata: .*the value of 'b' must be a string"):
        read(wire.SearchSessions, {"user_metadata": {"a": "x", "b": 1}})
    assert read(wire.SearchSessions, {"user_metadata": {"a": "x"}}).user_metadata == {"a": "x"}
