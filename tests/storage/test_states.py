from __future__ import annotations

import errno
import shutil

import pytest

from twinkle_serve.storage import checkpoints
from twinkle_serve.storage.states import StateFiles


def test_names_differ_where_owner_or_detail_do(tmp_path):
    files = StateFiles(tmp_path)
    names = {files.name_for(a, b) for a in ("s:train:0", "s/train/0", "..") for b in ("1", "../1", "1.2")}
    assert len(names) == 9
    assert all("/" not in name and name.endswith(checkpoints.STATE_SUFFIX) for name in names)


def test_a_file_is_found_and_removed_by_its_name(tmp_path):
    files = StateFiles(tmp_path)
    name = files.name_for("run", "1")
    assert not files.exists(name)
    assert checkpoints.write_file(files.path(name), b"abc") == 3
    assert files.exists(name)
    files.remove(name)
    files.remove(name)
    assert not files.exists(name)


def test_a_sweep_leaves_what_is_known(tmp_path):
    files = StateFiles(tmp_path)
    kept, gone = files.name_for("run", "1"), files.name_for("run", "2")
    for name in (kept, gone):
        checkpoints.write_file(files.path(name), b"abc")
    (tmp_path / "runs" / f".{gone}.partial-x").write_bytes(b"half")
    files.sweep([kept])
    assert [path.name for path in (tmp_path / "runs").iterdir()] == [kept]


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "file"
    checkpoints.write_file(path, b"old")

    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoints, "_fsync", full)
    with pytest.raises(OSError, match="No space"):
        checkpoints.write_file(path, b"new")
    assert path.read_bytes() == b"old"
    assert [each.name for each in tmp_path.iterdir()] == ["file"]


def test_it_knows_what_is_left_on_the_disk(tmp_path):
    files = StateFiles(tmp_path)
    assert 0 < files.free_bytes() <= shutil.disk_usage(tmp_path).total


@pytest.mark.parametrize("owner", ["x" * 300, "\0"])
def test_what_cannot_be_the_name_of_a_file_is_not_there_and_stops_nobody(tmp_path, owner):
    files = StateFiles(tmp_path)
    for name in (files.name_for(owner, "frozen"), owner):
        assert not files.exists(name)
        files.remove(name)
    files.sweep([owner])


def test_a_sweep_goes_on_behind_what_it_cannot_remove(tmp_path):
    files = StateFiles(tmp_path)
    (tmp_path / "runs" / "directory").mkdir()
    checkpoints.write_file(files.path("gone"), b"abc")
    files.sweep([])
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["directory"]
