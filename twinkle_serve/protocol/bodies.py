"""Request bodies as bytes: decompression with a limit, and lenient JSON.

Knows encodings only. Does not know what a body says.
"""

from __future__ import annotations

import json
from typing import Any

import orjson
import zstandard

from twinkle_serve.protocol.errors import BodyTooLarge, MalformedBody


def decompress(body: bytes, encoding: str | None, max_bytes: int) -> bytes:
    """``body`` without its Content-Encoding. Raises BodyTooLarge above ``max_bytes``, MalformedBody for
    broken or unknown encodings. Frames need not announce their size."""
    if not encoding or encoding == "identity":
        return body
    if encoding != "zstd":
        raise MalformedBody(f"Content-Encoding {encoding[:40]!r} is not supported; zstd is")
    reader = zstandard.ZstdDecompressor(max_window_size=2**27).stream_reader(body, read_across_frames=True)
    try:
        data: bytes = reader.read(max_bytes + 1)
    except zstandard.ZstdError as error:
        raise MalformedBody(f"the body is not valid zstd: {error}") from None
    if len(data) > max_bytes:
        raise BodyTooLarge(f"the body decompresses to more than {max_bytes} bytes")
    return data


def parse_object(body: bytes) -> dict[str, Any]:
    """The JSON object in ``body``; an empty body is {}. NaN and Infinity are let through, so that the
    field that holds them can be named. Raises MalformedBody."""
    if not body:
        return {}
    try:
        value = orjson.loads(body)
    except orjson.JSONDecodeError:
        try:
            value = json.loads(body)
        except (ValueError, RecursionError) as error:
            raise MalformedBody(f"the body is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise MalformedBody("the body must be a JSON object")
    return value
