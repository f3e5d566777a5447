"""build_once builds once, atomically, whoever asks; file_from_pypi takes one file out of a wheel."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import zipfile
from pathlib import Path

import pytest

from twinkle_serve.testing import cache
from twinkle_serve.testing.cache import build_once, file_from_pypi


def _write(directory: Path, text: str = "made") -> None:
    (directory / "file").write_text(text)


def test_builds_and_returns_an_absolute_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    made = build_once(Path("new root"), "thing", _write)
    assert made == tmp_path / "new root" / "thing"
    assert (made / "file").read_text() == "made"


def test_the_second_call_does_not_build(tmp_path: Path) -> None:
    build_once(tmp_path, "thing", _write)
    again = build_once(tmp_path, "thing", lambda directory: _write(directory, "made twice"))
    assert (again / "file").read_text() == "made"


def test_others_may_read_what_was_built(tmp_path: Path) -> None:
    assert build_once(tmp_path, "thing", _write).stat().st_mode & 0o777 == 0o755


def test_a_failed_build_leaves_nothing_and_can_be_repeated(tmp_path: Path) -> None:
    def fail(directory: Path) -> None:
        _write(directory, "half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        build_once(tmp_path, "thing", fail)
    assert [path.name for path in tmp_path.iterdir()] == [".thing.lock"]
    assert (build_once(tmp_path, "thing", _write) / "file").read_text() == "made"


def test_the_target_is_absent_until_it_is_complete(tmp_path: Path) -> None:
    def build(directory: Path) -> None:
        _write(directory)
        assert not (tmp_path / "thing").exists()

    assert build_once(tmp_path, "thing", build).is_dir()


def _build_in_a_process(root: Path, barrier: multiprocessing.synchronize.Barrier) -> None:
    def build(directory: Path) -> None:
        with (root / "builds.log").open("a") as log:
            log.write(f"{os.getpid()}\n")
        _write(directory)

    barrier.wait(30)
    assert (build_once(root, "thing", build) / "file").read_text() == "made"


def test_parallel_processes_build_once(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    barrier = context.Barrier(4)
    processes = [context.Process(target=_build_in_a_process, args=(tmp_path, barrier)) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0, 0, 0]
    assert len((tmp_path / "builds.log").read_text().splitlines()) == 1


@pytest.fixture
def local_wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Stands in for the package index: a wheel with one file; the list fills with what was asked for."""
    asked: list[str] = []

    def download(requirement: str, directory: Path) -> None:
        asked.append(requirement)
        with zipfile.ZipFile(directory / "stuff-1.0-py3-none-any.whl", "w") as wheel:
            wheel.writestr("stuff/data.bin", b"\x00payload")

    monkeypatch.setattr(cache, "_pip_download", download)
    return asked


def test_file_from_pypi_extracts_the_member_once(tmp_path: Path, local_wheel: list[str]) -> None:
    for _ in range(2):
        path = file_from_pypi(tmp_path, "stuff==1.0", "stuff/data.bin")
        assert path.read_bytes() == b"\x00payload"
    assert local_wheel == ["stuff==1.0"]
    assert [p.name for p in tmp_path.iterdir() if not p.name.startswith(".")] == ["pypi-stuff-1.0"]


def test_file_from_pypi_names_a_missing_member(tmp_path: Path, local_wheel: list[str]) -> None:
    with pytest.raises(KeyError, match=r"stuff/other\.bin"):
        file_from_pypi(tmp_path, "stuff==1.0", "stuff/other.bin")


def test_a_package_that_does_not_exist_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(subprocess.CalledProcessError):
        file_from_pypi(tmp_path, "twinkle-serve-has-no-such-dependency==0", "file")
