from __future__ import annotations

import io
import math
import tracemalloc

import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from twinkle_serve.protocol.bodies import decompress, decompress_small, parse_object
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


def test_what_says_that_it_is_small_is_unpacked_at_the_cost_of_that() -> None:
    pack = zstandard.compress
    assert decompress_small(pack(b"x" * 1000), 1000) == b"x" * 1000
    assert decompress_small(pack(b""), 1000) == b""
    assert decompress_small(pack(b"x" * 1001), 1000) is None
    unannounced = zstandard.ZstdCompressor(write_content_size=False).compress(b"x" * 10)
    for other in (unannounced, b"", b"x", pack(b"x" * 1000)[:-1], pack(b"") + bytes(1001)):
        assert decompress_small(other, 1000) is None


def test_a_frame_that_says_too_little_is_not_believed() -> None:
    """Blocks of four bytes, each of which fills the window with what it repeats."""
    window, blocks = 255, 10**4
    frame = b"\x28\xb5\x2f\xfd\x20" + bytes([window])
    block = ((window << 3) | 2).to_bytes(3, "little") + b"x"
    frame += block * blocks + ((window << 3) | 3).to_bytes(3, "little") + b"x"
    assert zstandard.get_frame_parameters(frame).content_size == window
    tracemalloc.start()
    try:
        assert decompress_small(frame, 2**16) is None
        assert tracemalloc.get_traced_memory()[1] < 2**16
    finally:
        tracemalloc.stop()


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
