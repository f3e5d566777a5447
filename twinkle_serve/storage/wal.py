"""Whether SQLite's write-ahead log ends in something that never became a transaction.

Knows the file's frames and checksums (sqlite.org/fileformat2.html, section 4). SQLite itself drops such a
tail without a word; an operator should read about it. Changes nothing.
"""

from __future__ import annotations

import struct
from pathlib import Path

_HEADER, _FRAME_HEADER = 32, 24


def torn_tail(database: Path) -> str | None:
    """What is wrong with the end of ``database``'s log, or None if it ends in a whole transaction."""
    try:
        data = database.with_name(f"{database.name}-wal").read_bytes()
    except FileNotFoundError:
        return None
    if len(data) < _HEADER:
        return None
    magic, _, page_size = struct.unpack(">III", data[:12])
    order = "<" if magic == 0x377F0682 else ">"
    salts, sums = data[16:24], _checksum(data[:24], order, (0, 0))
    committed = offset = _HEADER
    while offset < len(data):
        frame = data[offset : offset + _FRAME_HEADER + page_size]
        if len(frame) < _FRAME_HEADER + page_size:
            return f"the log is cut short {len(data) - committed} bytes after its last whole transaction"
        if frame[8:16] != salts:
            break  # left over from before the last checkpoint
        sums = _checksum(frame[:8] + frame[_FRAME_HEADER:], order, sums)
        if struct.pack(">II", *sums) != frame[16:24]:
            return f"the log is damaged {offset - committed} bytes after its last whole transaction"
        offset += len(frame)
        if frame[4:8] != bytes(4):
            committed = offset
    return (
        f"the log ends with a transaction that was never finished ({offset - committed} bytes)"
        if (offset > committed)
        else None
    )


def _checksum(data: bytes, order: str, sums: tuple[int, int]) -> tuple[int, int]:
    first, second = sums
    words = struct.unpack(f"{order}{len(data) // 4}I", data)
    for even, odd in zip(words[::2], words[1::2], strict=True):
        first = (first + even + second) & 0xFFFFFFFF
        second = (second + odd + first) & 0xFFFFFFFF
    return first, second
