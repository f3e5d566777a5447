"""Checkpoint directories that are whole or absent: atomic writing, replacing, checking, sweeping.

Knows files, sha256s and the manifest that lists them. Does not know what the files mean (engine/) nor who
owns them (catalog.py).
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import IO, Any, TypeVar

from twinkle_serve.faults import reach

T = TypeVar("T")
MANIFEST = "manifest.json"
# A run's state and a sampling snapshot are one file each; it checks itself (engine/state_files.py).
STATE_SUFFIX = ".safetensors"
_FILE_NAME = re.compile(r"\w[\w.-]*")
_PARTIAL = ".partial-"
_PREVIOUS = ".previous"
_AT_FDCWD = -100
_RENAME_EXCHANGE = 2


class CheckpointError(Exception):
    """Base of what can be wrong with a checkpoint on disk. The message says which file and why.

    CheckpointError
    +-- CheckpointMissingError  no such directory, or no manifest in it
    +-- CheckpointDamagedError  a file is missing, cut short, or changed since it was written
    """


class CheckpointMissingError(CheckpointError):
    pass


class CheckpointDamagedError(CheckpointError):
    pass


def write_checkpoint(
    directory: str | Path,
    files: Mapping[str, bytes | Callable[[Path], None]],
    manifest: Mapping[str, Any],
) -> int:
    """Put a checkpoint at ``directory``, whole and durable, replacing one that is there already.

    files: plain file name to its bytes, or to a function that writes them at the path it is given.
    manifest: JSON values; ``files`` with sha256 and size of each is added. Returns the size in bytes.
    Whatever dies meanwhile, ``directory`` stays what it was or becomes the new checkpoint.
    """
    assert "files" not in manifest
    assert MANIFEST not in files
    with _replacing(Path(directory)) as partial:
        listed = {name: _write_file(partial, name, content) for name, content in files.items()}
        reach("in save")
        document = json.dumps({**manifest, "files": listed}, indent=1, sort_keys=True).encode()
        _write_file(partial, MANIFEST, document)
    return sum(entry["size"] for entry in listed.values()) + len(document)


def copy_checkpoint(source: str | Path, target: str | Path) -> int:
    """Put the same checkpoint at ``target``; files are linked if they can be, for nothing ever changes one.
    If ``source`` is replaced meanwhile, it is that of before or the new one, as a whole. Returns the size in
    bytes. Raises CheckpointError."""
    while True:
        manifest = read_manifest(source)
        try:
            return _copy(Path(source), Path(target))
        except CheckpointError as error:
            if read_manifest(source) == manifest:
                raise CheckpointDamagedError(f"{source} cannot be copied: {error}") from None


def read_manifest(directory: str | Path) -> dict[str, Any]:
    """The manifest of a checkpoint. Raises CheckpointError."""
    path = Path(directory) / MANIFEST
    try:
        manifest = json.loads(path.read_bytes())
        for name, entry in manifest["files"].items():
            assert _FILE_NAME.fullmatch(name)
            assert isinstance(entry["size"], int)
            assert isinstance(entry["sha256"], str)
        return manifest
    except (FileNotFoundError, NotADirectoryError):
        raise CheckpointMissingError(f"no checkpoint at {directory}: it has no {MANIFEST}") from None
    except (ValueError, KeyError, TypeError, AttributeError, AssertionError):
        raise CheckpointDamagedError(f"{path} is not a readable manifest") from None


def check_sizes(directory: str | Path) -> dict[str, Any]:
    """The manifest, once every file it lists is found with its size. Cheap; raises CheckpointError."""
    manifest = read_manifest(directory)
    for name, entry in manifest["files"].items():
        path = Path(directory) / name
        if not path.is_file():
            raise CheckpointDamagedError(f"{path} is missing")
        if path.stat().st_size != entry["size"]:
            raise CheckpointDamagedError(f"{path} has {path.stat().st_size} bytes instead of {entry['size']}")
    return manifest


def verify(directory: str | Path) -> dict[str, Any]:
    """The manifest, once every file is found with its size and sha256. Raises CheckpointError."""
    manifest = check_sizes(directory)
    for name, entry in manifest["files"].items():
        path = Path(directory) / name
        if _sha256(path) != entry["sha256"]:
            raise CheckpointDamagedError(f"{path} has changed since it was written: its sha256 differs")
    return manifest


def read_whole(directory: str | Path, read: Callable[[dict[str, Any]], T]) -> T:
    """What ``read``, which is given the manifest, makes of the verified files. It is done again if the
    checkpoint is replaced meanwhile, so that it is that of before or the new one. Raises CheckpointError and
    what ``read`` raises."""
    while True:
        before = read_manifest(directory)
        try:
            verify(directory)
            found = read(before)
        except Exception:
            if read_manifest(directory) == before:
                raise
            continue
        if read_manifest(directory) == before:
            return found


def open_whole(directory: str | Path) -> tuple[ExitStack, dict[str, tuple[IO[bytes], int]]]:
    """What closes the files, and each listed file, opened, with its size: those of one save, which stay what
    they are when the checkpoint is replaced or deleted. Raises CheckpointError."""
    while True:
        before = read_manifest(directory)
        with ExitStack() as stack:
            try:
                found = {}
                for name, entry in before["files"].items():
                    file = stack.enter_context((Path(directory) / name).open("rb"))
                    found[name] = (file, int(entry["size"]))
            except FileNotFoundError as error:
                if read_manifest(directory) == before:
                    raise CheckpointDamagedError(f"{error.filename} is missing") from None
                continue
            if read_manifest(directory) == before:
                return stack.pop_all(), found


def remove_checkpoint(directory: str | Path) -> None:
    """Delete a checkpoint; no other process sees a part of it. Nothing happens if it is not there."""
    target = Path(directory)
    doomed = target.with_name(f".{target.name}{_PARTIAL}{uuid.uuid4().hex}")
    try:
        os.rename(target, doomed)
    except FileNotFoundError:
        return
    _fsync(target.parent)
    shutil.rmtree(doomed)


def write_file(path: str | Path, content: bytes | memoryview) -> int:
    """Put one file at ``path``, whole and durable, or not at all. Returns its size in bytes."""
    target = Path(path)
    _make_directories(target.parent)
    partial = target.with_name(f".{target.name}{_PARTIAL}{uuid.uuid4().hex}")
    try:
        partial.write_bytes(content)
        reach("in snapshot")
        _fsync(partial)
        os.rename(partial, target)
    finally:
        partial.unlink(missing_ok=True)
    _fsync(target.parent)
    return len(content)


def sweep(root: str | Path) -> list[Path]:
    """Finish what killed writers left below ``root``; a writer that still lives is left alone.

    Returns what was removed or put back.
    """
    swept = []
    for path in sorted(Path(root).glob(f"**/.*{_PREVIOUS}")):
        target = path.with_name(path.name.removeprefix(".").removesuffix(_PREVIOUS))
        if target.exists():
            shutil.rmtree(path)
        else:
            os.rename(path, target)
        swept.append(path)
    for path in sorted(Path(root).glob(f"**/.*{_PARTIAL}*")):
        with _locked(path, wait=False) as ours:
            if ours:
                shutil.rmtree(path)
                swept.append(path)
    return swept


def _make_directories(path: Path) -> None:
    if not path.exists():
        _make_directories(path.parent)
        path.mkdir(exist_ok=True)
        _fsync(path.parent)


@contextmanager
def _replacing(target: Path) -> Iterator[Path]:
    """An empty directory that is put at ``target`` once it is filled, or is gone if that fails."""
    _make_directories(target.parent)
    partial = target.with_name(f".{target.name}{_PARTIAL}{uuid.uuid4().hex}")
    partial.mkdir()
    with _locked(partial):
        try:
            yield partial
            _fsync(partial)
            _install(partial, target)
        finally:
            # After an exchange the partial name holds the replaced checkpoint.
            shutil.rmtree(partial, ignore_errors=True)


def _copy(source: Path, target: Path) -> int:
    with _replacing(target) as partial:
        _bring(source / MANIFEST, partial / MANIFEST)
        names = read_manifest(partial)["files"]
        for name in names:  # all of them before any is read, which takes long
            _bring(source / name, partial / name)
        verify(partial)
        for path in partial.iterdir():
            _fsync(path)
        return sum((partial / name).stat().st_size for name in (MANIFEST, *names))


def _bring(source: Path, target: Path) -> None:
    with suppress(FileNotFoundError):  # which whoever reads the copy will say
        try:
            os.link(source, target)
        except OSError:
            shutil.copyfile(source, target)


def _write_file(directory: Path, name: str, content: bytes | Callable[[Path], None]) -> dict[str, Any]:
    assert _FILE_NAME.fullmatch(name), name
    path = directory / name
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        content(path)
    _fsync(path)
    return {"sha256": _sha256(path), "size": path.stat().st_size}


def _install(partial: Path, target: Path) -> None:
    if not target.exists():
        os.rename(partial, target)
    elif not _exchange(partial, target):
        # A file system without exchange (NFS): two renames; sweep() undoes the first if we die between.
        previous = target.with_name(f".{target.name}{_PREVIOUS}")
        os.rename(target, previous)
        os.rename(partial, target)
        _fsync(target.parent)
        shutil.rmtree(previous)
    _fsync(target.parent)


def _exchange(one: Path, other: Path) -> bool:
    """Swap two names in one step; False where the system or the file system cannot."""
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if renameat2 is None:
        return False
    if renameat2(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE) == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP):
        return False
    raise OSError(code, os.strerror(code), str(other))


@contextmanager
def _locked(directory: Path, wait: bool = True) -> Iterator[bool]:
    """Hold the lock that says "its writer lives"; the kernel drops it with the process."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        yield True
    except BlockingIOError:
        yield False
    finally:
        os.close(descriptor)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
