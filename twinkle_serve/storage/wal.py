"""SQLite's write-ahead log as a file: whether it is whole, and made readable again where it is not.

SQLite drops all that comes after a frame whose checksum is wrong, without a word. At the end of the log that
is right: it is a transaction that never became one. In the middle it would lose what was acknowledged. There
only the checksums are put right, so that SQLite reads on; the damage itself stays where it is and shows in
the rows, which have digests of their own (journal_rows.py). Knows the file's format
(sqlite.org/fileformat2.html, section 4), and not what is in the pages.
"""

from __future__ import annotations

import shutil
import struct
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_HEADER, _FRAME_HEADER = 32, 24
_MAGIC = {"little": 0x377F0682, "big": 0x377F0683}
_VERSION = 3_007_000

Sums = tuple[int, int]


@dataclass(frozen=True, slots=True)
class _Frame:
    """A page as it became. fits: its checksum follows from what is before it. commits: a transaction ends."""

    offset: int
    fits: bool
    commits: bool


def mend(database: Path) -> str | None:
    """What is wrong with the log of ``database``, or None. Damage before the end of its last whole
    transaction is made readable in place, and the file as it was is kept beside it."""
    path = database.with_name(f"{database.name}-wal")
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return None
    if len(data) < _HEADER:
        return None
    header = _header(data, database)
    if header is None:
        return "the log cannot be read at all"
    frames = list(_frames(data, header))
    whole = max((n for n, frame in enumerate(frames, 1) if frame.fits and frame.commits), default=0)
    damaged = [frame.offset for frame in frames[:whole] if not frame.fits]
    if header != data[:_HEADER] and whole:
        damaged.insert(0, 0)
    if damaged:
        shutil.copyfile(path, path.with_name(f"{path.name}.damaged"))
        with path.open("r+b") as file:
            file.write(_with_new_sums(data, header, whole))
        return f"the log is damaged at byte {damaged[0]}, in the middle; it is read on behind that"
    return _torn(data, header, frames, whole)


def _torn(data: bytes, header: bytes, frames: list[_Frame], whole: int) -> str | None:
    end = _HEADER + whole * _frame_size(header)
    if len(frames) > whole:
        broken = next((frame for frame in frames[whole:] if not frame.fits), None)
        if broken is not None:
            return f"the log is damaged {broken.offset - end} bytes after its last whole transaction"
        return f"the log ends with a transaction that was never finished ({len(frames) - whole} pages)"
    rest = data[end:]
    if rest and len(rest) < _frame_size(header) and rest[8:16] == header[16:24]:
        return f"the log is cut short {len(rest)} bytes after its last whole transaction"
    return None


def _frame_size(header: bytes) -> int:
    return _FRAME_HEADER + int(struct.unpack(">I", header[8:12])[0])


def _header(data: bytes, database: Path) -> bytes | None:
    """The log's header, or the one that it must have had; None if that cannot be told."""
    if struct.unpack(">I", data[:4])[0] in _MAGIC.values():
        sums = _checksum(data[:24], _order(data), (0, 0))
        if struct.pack(">II", *sums) == data[24:_HEADER]:
            return data[:_HEADER]
    with database.open("rb") as file:
        page_size = int.from_bytes(file.read(18)[16:18], "big")
    page_size = 65536 if page_size == 1 else page_size
    if not page_size:
        return None
    salts = data[_HEADER + 8 : _HEADER + 16]
    if len(salts) < 8:
        return None
    head = struct.pack(">IIII", _MAGIC[sys.byteorder], _VERSION, page_size, 0) + salts
    return head + struct.pack(">II", *_checksum(head, _order(head), (0, 0)))


def _order(header: bytes) -> str:
    """In which byte order the words are that checksums are made of."""
    return "<" if header[3] == _MAGIC["little"] & 0xFF else ">"


def _frames(data: bytes, header: bytes) -> Iterator[_Frame]:
    """All frames up to the last of this log; behind it may be some of an earlier one."""
    size, salts = _frame_size(header), header[16:24]
    offsets = range(_HEADER, len(data) - size + 1, size)
    ours = [n for n, offset in enumerate(offsets, 1) if data[offset + 8 : offset + 16] == salts]
    before: set[Sums] = {_sums(header[24:32])}
    for offset in offsets[: max(ours, default=0)]:
        frame = data[offset : offset + size]
        stored = _sums(frame[16:24])
        made = {_checksum(frame[:8] + frame[_FRAME_HEADER:], _order(header), sums) for sums in before}
        fits = stored in made and frame[8:16] == salts
        # If this one does not fit, either its checksum is wrong or what that was made of.
        before = {stored} if fits else {stored, *made}
        yield _Frame(offset, fits, frame[4:8] != bytes(4))


def _with_new_sums(data: bytes, header: bytes, num_frames: int) -> bytes:
    size, sums, parts = _frame_size(header), _sums(header[24:32]), [header]
    for offset in range(_HEADER, _HEADER + num_frames * size, size):
        frame = data[offset : offset + size]
        sums = _checksum(frame[:8] + frame[_FRAME_HEADER:], _order(header), sums)
        parts += [frame[:8], header[16:24], struct.pack(">II", *sums), frame[_FRAME_HEADER:]]
    return b"".join(parts)


def _sums(data: bytes) -> Sums:
    first, second = struct.unpack(">II", data)
    return first, second


def _checksum(data: bytes, order: str, sums: Sums) -> Sums:
    first, second = sums
    words = struct.unpack(f"{order}{len(data) // 4}I", data)
    for even, odd in zip(words[::2], words[1::2], strict=True):
        first = (first + even + second) & 0xFFFFFFFF
        second = (second + odd + first) & 0xFFFFFFFF
    return first, second
