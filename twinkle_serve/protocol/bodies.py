"""Request bodies as bytes: decompression with a limit, and lenient JSON.

Knows encodings only. Does not know what a body says.
"""

from __future__ import annotations

import json
from typing import Any

import orjson
import zstandard

from twinkle_serve.protocol.errors import BodyTooLarge, MalformedBody

# So little input at a time that even a bomb (128 KiB from 4 bytes) expands by at most 32 MiB before the
# limit is looked at.
_ZSTD_INPUT_BYTES = 1024


def decompress(body: bytes, encoding: str | None, max_bytes: int) -> bytes:
    """``body`` without its Content-Encoding. Raises BodyTooLarge above ``max_bytes``, MalformedBody for
    broken or unknown encodings. Frames need not announce their size."""
    if not encoding or encoding == "identity":
        return body
    if encoding != "zstd":
        raise MalformedBody(f"Content-Encoding {encoding[:40]!r} is not supported; zstd is")
    reader = zstandard.ZstdDecompressor(max_window_size=2**27).decompressobj()
    parts, size = [], 0
    try:
        for start in range(0, len(body), _ZSTD_INPUT_BYTES):
            parts.append(reader.decompress(body[start : start + _ZSTD_INPUT_BYTES]))
            size += len(parts[-1])
            if size > max_bytes:
                raise BodyTooLarge(f"the body decompresses to more than {max_bytes} bytes")
    except zstandard.ZstdError as error:
        raise MalformedBody(f"the body is not valid zstd: {error}") from None
    if not reader.eof:
        raise MalformedBody("the body is not valid zstd: it is cut short")
    return b"".join(parts)


def decompress_small(body: bytes, most: int) -> bytes | None:
    """As ``decompress`` with zstd, where the body says that its content has at most ``most`` bytes, and at no
    more cost if that is not true. None for everything else, of which ``decompress`` must tell."""
    if len(body) > most:
        return None
    try:
        size = zstandard.get_frame_parameters(body).content_size
        if size > most:
            return None
        # Gives up where there is more than was announced.
        content = zstandard.ZstdDecompressor(max_window_size=2**27).decompress(body)
    except zstandard.ZstdError:
        return None
    return content if len(content) == size else None


def parse_object(body: bytes) -> dict[str, Any]:
    """The JSON object in ``body``; an empty body is {}. NaN and Infinity are let through, so that the
    field that holds them can be named. Raises MalformedBody."""
    if not body:
        return {}
    try:
        value = orjson.loads(body)
    except orjson.JSONDecodeError:
        try:
            # Without a hook in Python no other thread could run until the whole body is parsed.
            value = json.loads(body, object_hook=lambda item: item)
            _check_strings(value)
        except (ValueError, RecursionError) as error:
            raise MalformedBody(f"the body is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise MalformedBody("the body must be a JSON object")
    return value


def _check_strings(value: Any) -> None:
    """Raises ValueError for a lone surrogate, which this parser lets through: it could be stored but never be
    shown again."""
    left = [value]
    while left:
        item = left.pop()
        if isinstance(item, str):
            item.encode()
        elif isinstance(item, dict):
            left += item
            left += [inner for inner in item.values() if isinstance(inner, str | dict | list)]
        elif isinstance(item, list):
            left += [inner for inner in item if isinstance(inner, str | dict | list)]
