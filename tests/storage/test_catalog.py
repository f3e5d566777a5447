"""The catalogue: what was put is there after a restart, and nothing is listed that is not whole."""

from __future__ import annotations

import dataclasses
import logging
import subprocess
import sys
from pathlib import Path

import pytest
import sqlalchemy as sa
from hypothesis import given
from hypothesis import strategies as st

from twinkle_serve.protocol.data import LoraSpec
from twinkle_serve.storage.catalog import Catalog, Contents
from twinkle_serve.storage.checkpoints import CheckpointError, write_checkpoint
from twinkle_serve.storage.records import CheckpointRecord, RunRecord, SamplerRecord, SessionRecord

RUN_ID = "session-1:train:0"


@pytest.fixture
def catalog(tmp_path: Path):
    catalog = Catalog(tmp_path / "store")
    yield catalog
    catalog.close()


def _reopened(tmp_path: Path) -> Contents:
    catalog = Catalog(tmp_path / "store")
    try:
        return catalog.load_all()
    finally:
        catalog.close()


def _checkpoint(catalog: Catalog, name: str = "ck1", **changes) -> CheckpointRecord:
    directory = catalog.directory_for(RUN_ID, "weights", name)
    size = write_checkpoint(directory, {"adapter.bin": b"12345"}, {"step": 1})
    record = CheckpointRecord(
        run_id=RUN_ID,
        kind="weights",
        name=name,
        tenant="t1",
        base_model="m",
        spec=LoraSpec(rank=8, train_mlp=False),
        directory=directory,
        size_bytes=size,
        created_at=20.0,
        user_metadata={"who": "小明"},
    )
    record = dataclasses.replace(record, **changes)
    catalog.put_checkpoint(record)
    return record


def test_records_come_back_equal_after_a_restart(catalog: Catalog, tmp_path: Path) -> None:
    session = SessionRecord(
        "session-1", "t1", 1.0, {"tags": ["a"], "user_metadata": {}}, "finished", {"type": "x"}
    )
    run = RunRecord(RUN_ID, "session-1", 0, "t1", "m", LoraSpec(rank=8, seed=3), 2.0, 3.0, {"k": "v"})
    sampler = SamplerRecord(
        "session-1:sample:0", "session-1", "t1", "m", 4.0, model_path="tinker://x/weights/y"
    )
    catalog.put_session(session)
    catalog.put_run(run)
    catalog.put_sampler(sampler)
    checkpoint = _checkpoint(catalog)
    assert _reopened(tmp_path) == Contents((session,), (run,), (sampler,), (checkpoint,))


def test_putting_again_replaces_and_order_is_that_of_creation(catalog: Catalog, tmp_path: Path) -> None:
    for number, created_at in ((1, 5.0), (2, 3.0), (3, 4.0)):
        catalog.put_session(SessionRecord(f"s{number}", "t1", created_at))
    catalog.put_session(SessionRecord("s2", "t1", 9.0, status="expired"))
    sessions = _reopened(tmp_path).sessions
    assert [(s.session_id, s.status) for s in sessions] == [
        ("s3", "active"),
        ("s1", "active"),
        ("s2", "expired"),
    ]


def test_a_later_versions_field_with_a_default_reads_old_rows(catalog: Catalog) -> None:
    catalog.put_session(SessionRecord("s1", "t1", 1.0))
    with catalog._engine.begin() as connection:
        connection.execute(
            sa.text("UPDATE sessions SET record = :r"),
            {"r": '{"session_id": "s1", "tenant": "t1", "created_at": 1.0}'},
        )
    assert catalog.load_all().sessions == (SessionRecord("s1", "t1", 1.0),)


def test_set_and_delete_checkpoint(catalog: Catalog, tmp_path: Path) -> None:
    record = _checkpoint(catalog)
    catalog.set_checkpoint(RUN_ID, "weights", "ck1", public=True, expires_at=99.0)
    assert _reopened(tmp_path).checkpoints == (dataclasses.replace(record, public=True, expires_at=99.0),)
    catalog.delete_checkpoint(RUN_ID, "weights", "ck1")
    assert _reopened(tmp_path).checkpoints == ()
    with pytest.raises(KeyError):
        catalog.set_checkpoint(RUN_ID, "weights", "ck1", public=True, expires_at=None)


@pytest.mark.parametrize("lost", ["", "manifest.json", "adapter.bin"])
def test_a_checkpoint_whose_files_are_gone_is_never_listed(
    catalog: Catalog, tmp_path: Path, caplog: pytest.LogCaptureFixture, lost: str
) -> None:
    keeper, phantom = _checkpoint(catalog, "keeper"), _checkpoint(catalog, "phantom")
    if lost:
        Path(phantom.directory, lost).unlink()
    else:
        catalog.remove_directory(phantom.directory)
    with caplog.at_level(logging.ERROR):
        assert _reopened(tmp_path).checkpoints == (keeper,)
    assert "dropped checkpoint session-1:train:0/weights/phantom" in caplog.text
    caplog.clear()
    assert _reopened(tmp_path).checkpoints == (keeper,)
    assert caplog.text == ""


def test_a_manifest_with_other_content_takes_its_checkpoint_off_the_list_and_no_other(
    catalog: Catalog, caplog: pytest.LogCaptureFixture
) -> None:
    keeper, damaged = _checkpoint(catalog, "keeper"), _checkpoint(catalog, "damaged")
    manifest = Path(damaged.directory, "manifest.json")
    manifest.write_bytes(manifest.read_bytes().replace(b'"size"', b'"sizd"'))
    assert catalog.load_all().checkpoints == (keeper,)
    assert "dropped checkpoint session-1:train:0/weights/damaged" in caplog.text


def test_a_checkpoint_that_cannot_be_read_now_keeps_its_name(
    catalog: Catalog, caplog: pytest.LogCaptureFixture
) -> None:
    keeper, away = _checkpoint(catalog, "keeper"), _checkpoint(catalog, "away")
    manifest = Path(away.directory, "manifest.json")
    manifest.unlink()
    manifest.symlink_to(manifest)  # ELOOP for whoever opens it, root included
    assert catalog.load_all().checkpoints == (keeper, away)
    assert "session-1:train:0/weights/away cannot be read now" in caplog.text


def test_a_checkpoint_replaced_but_not_listed_again_shows_its_real_size(catalog: Catalog) -> None:
    record = _checkpoint(catalog)
    size = write_checkpoint(record.directory, {"adapter.bin": b"a longer one"}, {"step": 2})
    assert catalog.load_all().checkpoints[0].size_bytes == size != record.size_bytes


def test_root_can_be_moved(catalog: Catalog, tmp_path: Path) -> None:
    _checkpoint(catalog)
    catalog.close()
    (tmp_path / "store").rename(tmp_path / "elsewhere")
    moved = Catalog(tmp_path / "elsewhere")
    (record,) = moved.load_all().checkpoints
    assert moved.files(record.directory)["adapter.bin"] == 5
    moved.close()


def test_leftovers_of_a_killed_writer_are_swept_at_load(
    catalog: Catalog, caplog: pytest.LogCaptureFixture
) -> None:
    leftover = Path(catalog.directory_for(RUN_ID, "weights", "x")).with_name(".x.partial-0123")
    leftover.mkdir(parents=True)
    (leftover / "adapter.bin").write_bytes(b"half")
    catalog.load_all()
    assert not leftover.exists()
    assert "swept" in caplog.text


def test_files_lists_sizes_with_the_manifest(catalog: Catalog) -> None:
    record = _checkpoint(catalog)
    files = catalog.files(record.directory)
    assert set(files) == {"adapter.bin", "manifest.json"}
    assert sum(files.values()) == record.size_bytes
    with pytest.raises(CheckpointError):
        catalog.files(catalog.directory_for(RUN_ID, "weights", "none"))


@given(st.tuples(*[st.text(max_size=12) for _ in range(6)]))
def test_directories_differ_and_never_leave_the_root(tmp_path_factory, parts) -> None:
    root = tmp_path_factory.getbasetemp() / "hypothesis-root"
    catalog = Catalog(root)
    try:
        paths = []
        for key in (parts[:3], parts[3:]):
            try:
                path = Path(catalog.directory_for(*key))
            except ValueError:
                return
            assert path.resolve().parents[2] == (root / "checkpoints").resolve()
            assert not path.name.startswith(".")
            paths.append(path)
        assert (paths[0] == paths[1]) == (parts[:3] == parts[3:])
    finally:
        catalog.close()


@pytest.mark.parametrize("name", ["..", ".", "../../x", ".hidden", "a/b", "a\x00b"])
def test_hostile_names_become_harmless_segments(catalog: Catalog, name: str) -> None:
    path = Path(catalog.directory_for(RUN_ID, "weights", name))
    assert ".." not in path.parts
    assert len(path.relative_to(catalog._checkpoints).parts) == 3


@pytest.mark.parametrize("name", ["", "x" * 201, "名" * 23])
def test_names_that_no_file_system_takes_are_refused(catalog: Catalog, name: str) -> None:
    with pytest.raises(ValueError, match="cannot name a checkpoint"):
        catalog.directory_for(RUN_ID, "weights", name)


def test_remove_directory_stays_below_the_root(catalog: Catalog, tmp_path: Path) -> None:
    (tmp_path / "precious").mkdir()
    for target in (tmp_path / "precious", catalog._checkpoints / ".." / ".." / "precious"):
        with pytest.raises(AssertionError):
            catalog.remove_directory(target)
    assert (tmp_path / "precious").exists()


def test_rows_survive_a_kill_right_after_the_call(tmp_path: Path) -> None:
    program = """
import os, signal, sys
from twinkle_serve.storage.catalog import Catalog
from twinkle_serve.storage.records import SessionRecord
Catalog(sys.argv[1]).put_session(SessionRecord("s1", "t1", 1.0))
os.kill(os.getpid(), signal.SIGKILL)
"""
    done = subprocess.run([sys.executable, "-c", program, str(tmp_path / "store")], check=False)
    assert done.returncode == -9
    assert [s.session_id for s in _reopened(tmp_path).sessions] == ["s1"]


def test_needs_neither_torch_nor_ray(tmp_path: Path) -> None:
    program = (
        "import sys; import twinkle_serve.storage.catalog; "
        "sys.exit(bool({'torch', 'ray', 'numpy.testing'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
