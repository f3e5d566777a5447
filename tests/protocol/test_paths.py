from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tinker.types.checkpoint import ParsedCheckpointTinkerPath

from twinkle_serve.protocol.errors import UserError
from twinkle_serve.protocol.paths import KINDS, CheckpointPath, parse_path, validate_name


@pytest.mark.parametrize("scheme", ["tinker", "twinkle"])
@pytest.mark.parametrize("kind", KINDS)
def test_both_schemes_are_read(scheme: str, kind: str) -> None:
    path = parse_path(f"{scheme}://s-1:train:0/{kind}/ck.1")
    assert path == CheckpointPath("s-1:train:0", kind, "ck.1")
    assert str(path) == f"tinker://s-1:train:0/{kind}/ck.1"
    assert path.checkpoint_id == f"{kind}/ck.1"
    assert ParsedCheckpointTinkerPath.from_tinker_path(str(path)).training_run_id == "s-1:train:0"


@pytest.mark.parametrize(
    "path",
    [
        "",
        None,
        7,
        "ck1",
        "tinker://",
        "tinker://run/weights",
        "tinker://run/weights/",
        "tinker://run/weights/a/b",
        "tinker://run/other/a",
        "tinker://../weights/a",
        "tinker://run/weights/..",
        "tinker://run/weights/a\0",
        "tinker://run/weights/a\n",
        "tinker://run/weights/a%2fb",
        "tinker://run/weights/publish",
        "tinker://run/weights/" + "a" * 200,
        "twinkle:/run/weights/a",
        "file:///etc/passwd",
    ],
)
def test_anything_else_is_refused(path: object) -> None:
    with pytest.raises(UserError, match="tinker://RUN_ID"):
        parse_path(path)


@given(st.text(max_size=40))
def test_parsing_never_fails_otherwise(text: str) -> None:
    for candidate in (text, f"tinker://{text}", f"tinker://r/weights/{text}"):
        try:
            parsed = parse_path(candidate)
        except UserError:
            continue
        assert "/" not in parsed.name
        assert parsed.name not in (".", "..")


@pytest.mark.parametrize("name", ["a", "A-b_c.9", "x" * 128])
def test_good_names(name: str) -> None:
    assert validate_name(name) == name


@pytest.mark.parametrize(
    "name", ["", "a/b", "a b", "é", ".", "..", "publish", "ttl", "archive", "x" * 129, 1]
)
def test_bad_names_name_the_field(name: object) -> None:
    with pytest.raises(UserError, match="path"):
        validate_name(name)
