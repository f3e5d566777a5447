from __future__ import annotations

import io
import math

import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from twinkle_serve.protocol.bodies import decompress, parse_object
from twinkle_serve.protocol.errors import BodyTooLarge, MalformedBody


@given(st.binary(max_size=2000))
def test_zstd_round_trip_with_and_without_announced_size(data: bytes) -> None:
    assert decompress(zstandard.ZstdCompressor().compress(data), "zstd", 2000) == data
    stream = io.BytesIO()
    with zstandard.ZstdCompressor().stream_writer(stream, closefd=False) as writer:
        writer.write(data)
    assert decompress(stream.getvalue(), "zstd", 2000) == data


@given(st.binary(max_size=200))
def test_broken_zstd_is_malformed(data: bytes) -> None:
    try:
        decompress(data, "zstd", 1000)
    except MalformedBody:
        return


def test_a_cut_frame_is_malformed() -> None:
    whole = zstandard.ZstdCompressor().compress(bytes(range(256)) * 50)
    with pytest.raises(MalformedBody):
        decompress(whole[: len(whole) // 2], "zstd", 10**6)


def test_a_bomb_stops_at_the_limit() -> None:
    bomb = zstandard.ZstdCompressor().compress(bytes(50_000_000))
    assert len(bomb) < 5000
    with pytest.raises(BodyTooLarge, match="more than 1000 bytes"):
        decompress(bomb, "zstd", 1000)


def test_other_encodings_are_named() -> None:
    assert decompress(b"x", None, 1) == decompress(b"x", "identity", 1) == b"x"
    with pytest.raises(MalformedBody, match="gzip"):
        decompress(b"x", "gzip", 10)


def test_nan_is_let_through_for_the_field_to_be_named() -> None:
    assert math.isnan(parse_object(b'{"a": NaN}')["a"])
    assert parse_object(b'{"a": -Infinity}') == {"a": -math.inf}
    assert parse_object(b"") == {}


@pytest.mark.parametrize(
    "body",
    [
        b'{"a": "\\ud800"}',
        b'{"\\udfff": 1}',
        b'{"a": [{"b": "x\\ud800"}]}',
        b'{"a": "\xed\xa0\x80"}',
        b"{",
        b"[]",
        b"1",
        b"null",
        b"\xff\xfe",
        b"{" * 10**5,
        b'{"a":' * 10**5,
        b"[" * 10**5,
    ],
)
def test_what_is_no_object_is_malformed(body: bytes) -> None:
    with pytest.raises(MalformedBody):
        parse_object(body)


@given(st.binary(max_size=100))
def test_any_bytes_are_an_object_or_malformed(body: bytes) -> None:
    try:
        assert isinstance(parse_object(body), dict)
    except MalformedBody:
        return
