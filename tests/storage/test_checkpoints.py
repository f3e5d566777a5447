"""Checkpoint directories: what a reader sees at every moment of a writer's life and death."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from twinkle_serve.storage import checkpoints
from twinkle_serve.storage.checkpoints import (
    CheckpointDamagedError,
    CheckpointMissingError,
    copy_checkpoint,
    read_manifest,
    remove_checkpoint,
    sweep,
    verify,
    write_checkpoint,
)

OLD = {"adapter.bin": b"old" * 1000, "config.json": b"{}"}
NEW = {"adapter.bin": b"newer" * 1000, "optimizer.bin": b"moments"}


def _contents(directory: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in directory.iterdir() if p.name != checkpoints.MANIFEST}


def test_written_checkpoint_holds_the_files_and_a_manifest_of_them(tmp_path: Path) -> None:
    directory = tmp_path / "runs" / "one"
    size = write_checkpoint(
        directory, {"a": b"abc", "b": lambda path: path.write_text("hello")}, {"base_model": "m", "step": 3}
    )
    manifest = verify(directory)
    assert (manifest["base_model"], manifest["step"]) == ("m", 3)
    assert manifest["files"]["b"]["size"] == 5
    assert manifest["files"]["a"]["sha256"].startswith("ba7816bf8f01cfea")
    assert size == sum(path.stat().st_size for path in directory.iterdir())
    assert [path.name for path in directory.parent.iterdir()] == ["one"]


def test_overwriting_replaces_every_file(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "c", OLD, {"step": 1})
    write_checkpoint(tmp_path / "c", NEW, {"step": 2})
    assert _contents(tmp_path / "c") == NEW
    assert verify(tmp_path / "c")["step"] == 2
    assert os.listdir(tmp_path) == ["c"]


def test_overwriting_where_the_file_system_cannot_exchange(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(checkpoints, "_exchange", lambda one, other: False)
    write_checkpoint(tmp_path / "c", OLD, {})
    write_checkpoint(tmp_path / "c", NEW, {})
    assert _contents(tmp_path / "c") == NEW
    assert os.listdir(tmp_path) == ["c"]


def test_writer_that_raises_leaves_the_old_checkpoint_alone(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "c", OLD, {})

    def explode(path: Path) -> None:
        path.write_bytes(b"half")
        raise OSError("no space left on device")

    with pytest.raises(OSError, match="no space left"):
        write_checkpoint(tmp_path / "c", {"adapter.bin": b"x", "more": explode}, {})
    assert _contents(tmp_path / "c") == OLD
    assert os.listdir(tmp_path) == ["c"]


@pytest.mark.parametrize("name", ["../up", "a/b", "", "..", "/etc/passwd"])
def test_file_names_are_plain(tmp_path: Path, name: str) -> None:
    with pytest.raises(AssertionError):
        write_checkpoint(tmp_path / "c", {name: b"x"}, {})


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[7] ^= 1
    path.write_bytes(bytes(data))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (Path.unlink, "adapter.bin is missing"),
        (_truncate, "2999 bytes instead of 3000"),
        (_flip, "sha256 differs"),
    ],
)
def test_verify_names_the_damaged_file(tmp_path: Path, damage, message: str) -> None:
    write_checkpoint(tmp_path / "c", OLD, {})
    damage(tmp_path / "c" / "adapter.bin")
    with pytest.raises(CheckpointDamagedError, match=message):
        verify(tmp_path / "c")


def test_missing_checkpoint_and_missing_manifest(tmp_path: Path) -> None:
    with pytest.raises(CheckpointMissingError):
        verify(tmp_path / "c")
    (tmp_path / "c").mkdir()
    with pytest.raises(CheckpointMissingError):
        read_manifest(tmp_path / "c")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "{}",
        '{"files": 3}',
        '{"files": ["a"]}',
        '{"files": {"a": 5}}',
        '{"files": {"a": {"sizd": 5, "sha256": "0"}}}',
        '{"files": {"a": {"size": "5", "sha256": "0"}}}',
        '{"files": {"a": {"size": 5, "sha256": null}}}',
        '{"files": {"../a": {"size": 5, "sha256": "0"}}}',
    ],
)
def test_unreadable_manifest_is_damage(tmp_path: Path, text: str) -> None:
    (tmp_path / checkpoints.MANIFEST).write_text(text)
    with pytest.raises(CheckpointDamagedError):
        read_manifest(tmp_path)


def test_a_copy_is_the_same_checkpoint_and_stands_on_its_own(tmp_path: Path) -> None:
    size = write_checkpoint(tmp_path / "c", OLD, {"step": 1})
    assert copy_checkpoint(tmp_path / "c", tmp_path / "deep" / "copy") == size
    assert os.path.samefile(tmp_path / "c" / "adapter.bin", tmp_path / "deep" / "copy" / "adapter.bin")
    remove_checkpoint(tmp_path / "c")
    assert verify(tmp_path / "deep" / "copy")["step"] == 1
    assert _contents(tmp_path / "deep" / "copy") == OLD
    assert os.listdir(tmp_path / "deep") == ["copy"]


def test_a_copy_where_the_file_system_cannot_link(tmp_path: Path, monkeypatch) -> None:
    def cannot(source: Path, target: Path) -> None:
        raise PermissionError("no hard links here")

    monkeypatch.setattr(os, "link", cannot)
    write_checkpoint(tmp_path / "c", OLD, {"step": 1})
    copy_checkpoint(tmp_path / "c", tmp_path / "copy")
    assert verify(tmp_path / "copy")["step"] == 1
    assert _contents(tmp_path / "copy") == OLD


@pytest.mark.parametrize("can_link", [True, False])
@pytest.mark.parametrize("moment", range(2 * (len(OLD) + 1)))
def test_a_copy_of_what_is_replaced_meanwhile_is_the_old_one_or_the_new(
    tmp_path: Path, monkeypatch, moment: int, can_link: bool
) -> None:
    """moment: before or after which file is brought."""
    write_checkpoint(tmp_path / "c", OLD, {"step": 1})
    bring, steps = os.link if can_link else shutil.copyfile, itertools.count()

    def step() -> None:
        if next(steps) == moment:
            write_checkpoint(tmp_path / "c", NEW, {"step": 2})

    def bringing(source: Path, target: Path) -> None:
        step()
        bring(source, target)
        step()

    def cannot(source: Path, target: Path) -> None:
        raise PermissionError("no hard links here")

    monkeypatch.setattr(os, "link", bringing if can_link else cannot)
    if not can_link:
        monkeypatch.setattr(shutil, "copyfile", bringing)
    size = copy_checkpoint(tmp_path / "c", tmp_path / "copy")
    step_of_copy = verify(tmp_path / "copy")["step"]
    assert _contents(tmp_path / "copy") == (OLD if step_of_copy == 1 else NEW)
    assert size == sum(path.stat().st_size for path in (tmp_path / "copy").iterdir())
    assert sorted(os.listdir(tmp_path)) == ["c", "copy"]


@pytest.mark.parametrize("damage", [Path.unlink, _truncate, _flip])
def test_a_damaged_checkpoint_is_not_copied(tmp_path: Path, damage) -> None:
    write_checkpoint(tmp_path / "c", OLD, {})
    damage(tmp_path / "c" / "adapter.bin")
    with pytest.raises(CheckpointDamagedError, match=f"{tmp_path / 'c'} cannot be copied: .*adapter.bin"):
        copy_checkpoint(tmp_path / "c", tmp_path / "copy")
    assert os.listdir(tmp_path) == ["c"]
    with pytest.raises(CheckpointMissingError):
        copy_checkpoint(tmp_path / "none", tmp_path / "copy")


def test_remove_is_idempotent(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "c", OLD, {})
    remove_checkpoint(tmp_path / "c")
    remove_checkpoint(tmp_path / "c")
    assert os.listdir(tmp_path) == []


def test_sweep_spares_a_living_writer(tmp_path: Path) -> None:
    swept: list[Path] = []

    def sweeping(path: Path) -> None:
        swept.extend(sweep(tmp_path))
        path.write_bytes(b"x")

    write_checkpoint(tmp_path / "run" / "c", {"a": sweeping}, {})
    assert swept == []
    assert _contents(tmp_path / "run" / "c") == {"a": b"x"}


# A writer killed at every system call that changes the disk. The count of calls is found by a first run
# that nothing kills, so a step added to the writer is covered by itself.
_WRITER = """
    import json, os, signal, sys
    from pathlib import Path
    from twinkle_serve.storage import checkpoints
    target, action, kill_at = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
    if len(sys.argv) > 4: checkpoints._exchange = lambda one, other: False
    steps = 0
    CHANGES = {"open", "os.mkdir", "os.rename", "os.rmdir", "os.remove", "ctypes.dlsym", "fcntl.flock"}
    def count(event, arguments):
        global steps
        if armed and event in CHANGES:
            steps += 1
            if steps == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)
    armed = False
    sys.addaudithook(count)
    new = {"adapter.bin": b"newer" * 1000, "optimizer.bin": lambda path: path.write_bytes(b"moments")}
    armed = True
    if action == "write":
        checkpoints.write_checkpoint(target, new, {"step": 2})
    else:
        checkpoints.remove_checkpoint(target)
    armed = False
    print(steps)
"""


def _run_writer(target: Path, action: str, kill_at: int, *more: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", textwrap.dedent(_WRITER), str(target), action, str(kill_at), *more]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def _num_steps(tmp_path: Path, action: str, exists: bool, *more: str) -> int:
    target = tmp_path / "rehearsal" / "c"
    if exists:
        write_checkpoint(target, OLD, {"step": 1})
    done = _run_writer(target, action, -1, *more)
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


@pytest.mark.parametrize(
    ("action", "exists", "more"),
    [
        ("write", False, ()),
        ("write", True, ()),
        ("write", True, ("no-exchange",)),
        ("remove", True, ()),
    ],
)
def test_killed_at_any_step_a_checkpoint_is_absent_or_complete(
    tmp_path: Path, action: str, exists: bool, more: tuple[str, ...]
) -> None:
    num_steps = _num_steps(tmp_path, action, exists, *more)
    assert num_steps >= 2
    outcomes = set()
    for kill_at in range(1, num_steps + 1):
        target = tmp_path / f"at {kill_at}" / "c"
        if exists:
            write_checkpoint(target, OLD, {"step": 1})
        assert _run_writer(target, action, kill_at, *more).returncode == -9
        if exists and action == "write" and not more:
            verify(target)  # before any sweep: never a moment without either
        sweep(tmp_path)
        if target.parent.exists():
            assert os.listdir(target.parent) in ([], ["c"])
        if target.exists():
            step = verify(target)["step"]
            assert _contents(target) == (OLD if step == 1 else NEW)
            outcomes.add(step)
        else:
            outcomes.add(None)
    assert outcomes == {1 if exists else None, None if action == "remove" else 2}


def test_manifest_is_plain_json(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "c", {"a": b"x"}, {"user_metadata": {"who": "小明"}})
    tree = json.loads((tmp_path / "c" / checkpoints.MANIFEST).read_text())
    assert set(tree) == {"files", "user_metadata"}
