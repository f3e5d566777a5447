"""What is wrong with a request is told in few words, however much was sent."""

from __future__ import annotations

import pytest

from twinkle_serve.protocol.errors import UserError
from twinkle_serve.protocol.losses import find_loss
from twinkle_serve.protocol.paths import parse_path, validate_name
from twinkle_serve.protocol.showing import shown
from twinkle_serve.protocol.work import MAX_MESSAGE, Failure


def test_values_are_shown_short() -> None:
    values = "a", 1, None, True, {}, [1]
    assert [shown(value) for value in values] == [
        "'a'",
        "1",
        "None",
        "True",
        "an object",
        "a list",
    ]
    assert len(shown("a" * 10**6)) == 64


@pytest.mark.parametrize("value", [["a" * 10**6], {"a" * 10**6: 1}, "a" * 10**6])
def test_messages_stay_short(value: object) -> None:
    for check in (find_loss, parse_path, validate_name):
        with pytest.raises(UserError) as caught:
            check(value)
        assert len(str(caught.value)) < 1000


def test_a_run_id_has_a_limit() -> None:
    assert parse_path("tinker://" + "a" * 200 + "/weights/a").name == "a"
    with pytest.raises(UserError):
        parse_path("tinker://" + "a" * 201 + "/weights/a")


def test_a_failure_keeps_no_more_than_its_limit() -> None:
    assert len(Failure("x" * 10**6).message) == MAX_MESSAGE
