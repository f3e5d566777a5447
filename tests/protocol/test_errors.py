from __future__ import annotations

import pickle

import pytest

from twinkle_serve.protocol import errors


def test_the_exported_names_are_pinned() -> None:
    assert sorted(errors.__all__) == [
        "Absent",
        "BackendUnavailable",
        "BodyTooLarge",
        "Busy",
        "Expired",
        "Lost",
        "MalformedBody",
        "Unauthorized",
        "UserError",
        "WireError",
    ]


def test_the_drawn_tree_is_the_real_one() -> None:
    """The docstring shows every class with its status."""
    lines = {
        words[1]: words[2] for line in (errors.__doc__ or "").splitlines() if (words := line.split())[2:]
    }
    for name in errors.__all__:
        kind = getattr(errors, name)
        if kind not in (errors.WireError, errors.UserError):
            assert lines[name] == str(kind.status)


@pytest.mark.parametrize("name", [name for name in errors.__all__ if name != "WireError"])
def test_errors_travel_between_processes(name: str) -> None:
    error = getattr(errors, name)("what is wrong")
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is type(error)
    assert str(copy) == "what is wrong"


def test_a_user_error_becomes_a_failure() -> None:
    failure = errors.UserError("data[0] is odd").as_failure()
    assert (failure.message, failure.category) == ("data[0] is odd", "user")
