from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import pytest

from twinkle_serve.control.backend import Invalid, NotFound
from twinkle_serve.control.checkpoints import MAX_TTL_S, Checkpoints, check_ttl
from twinkle_serve.protocol.data import LoraSpec
from twinkle_serve.protocol.errors import UserError
from twinkle_serve.storage.catalog import Catalog
from twinkle_serve.storage.records import CheckpointRecord

PATH = "tinker://run/weights/n"


@pytest.fixture
def catalog(tmp_path):
    catalog = Catalog(tmp_path, "sqlite://")
    yield catalog
    catalog.close()


@pytest.fixture
def checkpoints(catalog) -> Checkpoints:
    return Checkpoints(catalog)


def save(checkpoints: Checkpoints, name: str = "n", overwrite: bool = False, **fields) -> CheckpointRecord:
    """What a save does, with a file in place of the engine's."""
    directory = checkpoints.reserve("run", "weights", name, overwrite)
    Path(directory).mkdir(parents=True, exist_ok=True)
    record = CheckpointRecord(
        "run", "weights", name, "alice", "base", LoraSpec(8), directory, 0, 0.0, **fields
    )
    checkpoints.commit(record, 7)
    return replace(record, size_bytes=7)


def full(*args: object, **more: object) -> None:
    raise OSError("No space left on device")


def test_a_checkpoint_is_listed_when_it_is_whole(checkpoints, catalog):
    checkpoints.reserve("run", "weights", "n", False)
    with pytest.raises(NotFound):
        checkpoints.find("alice", PATH)
    assert checkpoints.is_saving(PATH)
    checkpoints._release(("run", "weights", "n"))
    record = save(checkpoints)
    assert checkpoints.find("alice", PATH) == record
    assert not checkpoints.is_saving(PATH)
    assert not checkpoints.is_saving("nonsense")


@pytest.mark.parametrize("state", ["saving", "saved"])
def test_a_name_is_taken_from_the_start_of_its_save_unless_overwriting(checkpoints, state):
    if state == "saved":
        save(checkpoints)
    else:
        checkpoints.reserve("run", "weights", "n", False)
    with pytest.raises(UserError, match="exists already"):
        checkpoints.reserve("run", "weights", "n", False)
    checkpoints.reserve("run", "weights", "n", True)
    checkpoints.reserve("run", "sampler_weights", "n", False)


def test_a_failed_save_frees_the_name(checkpoints):
    checkpoints.reserve("run", "weights", "n", False)
    checkpoints._release(("run", "weights", "n"))
    save(checkpoints)


def test_a_save_that_cannot_be_listed_leaves_neither_its_name_taken_nor_files(checkpoints, catalog):
    with patch.object(catalog, "put_checkpoint", full), pytest.raises(OSError, match="No space left"):
        save(checkpoints)
    assert not checkpoints.is_saving(PATH)
    assert not Path(catalog.directory_for("run", "weights", "n")).exists()
    record = save(checkpoints)
    with patch.object(catalog, "put_checkpoint", full), pytest.raises(OSError, match="No space left"):
        save(checkpoints, overwrite=True)
    assert checkpoints.find("alice", PATH) == record
    assert Path(record.directory).exists()


def test_what_the_catalogue_does_not_take_is_not_so(checkpoints, catalog):
    record = save(checkpoints)
    with patch.object(catalog, "set_checkpoint", full):
        with pytest.raises(OSError, match="No space left"):
            checkpoints.publish(record, True)
        with pytest.raises(OSError, match="No space left"):
            checkpoints.set_ttl(record, 3600, 0.0)
    assert checkpoints.find("alice", PATH) == record
    with pytest.raises(NotFound):
        checkpoints.find("bob", PATH)
    checkpoints.expire(1e9)
    assert checkpoints.find("alice", PATH) == record


def test_only_its_tenant_sees_a_checkpoint_until_it_is_public(checkpoints):
    record = save(checkpoints)
    with pytest.raises(NotFound):
        checkpoints.find("bob", PATH)
    checkpoints.publish(record, True)
    assert checkpoints.find("bob", PATH).public
    with pytest.raises(NotFound):
        checkpoints.owned("bob", PATH)
    with pytest.raises(Invalid):
        checkpoints.find("bob", "run/weights/n")


def test_files_go_with_the_checkpoint(checkpoints):
    record = save(checkpoints)
    checkpoints.delete(record)
    assert not Path(record.directory).exists()
    with pytest.raises(NotFound):
        checkpoints.find("alice", PATH)
    assert checkpoints.of_run("run") == checkpoints.of_tenant("alice") == []


def test_files_that_are_read_outlive_their_checkpoint_until_the_last_reader(checkpoints):
    record = save(checkpoints)
    checkpoints.pin(record.directory)
    checkpoints.pin(record.directory)
    checkpoints.delete(record)
    with pytest.raises(UserError, match="still being read"):
        checkpoints.reserve("run", "weights", "n", False)
    checkpoints.unpin(record.directory)
    assert Path(record.directory).exists()
    checkpoints.unpin(record.directory)
    assert not Path(record.directory).exists()
    save(checkpoints)


def test_deleting_while_the_name_is_saved_anew_spares_the_new_files(checkpoints):
    record = save(checkpoints)
    checkpoints.pin(record.directory)
    checkpoints.reserve("run", "weights", "n", True)
    checkpoints.delete(record)
    checkpoints.commit(record, 8)
    checkpoints.unpin(record.directory)
    assert Path(record.directory).exists()
    checkpoints.reserve("run", "weights", "n", True)
    checkpoints.delete(checkpoints.find("alice", PATH))
    assert Path(record.directory).exists()


def test_expiry(checkpoints):
    save(checkpoints, "short", expires_at=100.0)
    lifted = save(checkpoints, "lifted", expires_at=100.0)
    prolonged = save(checkpoints, "prolonged", expires_at=100.0)
    checkpoints.set_ttl(lifted, None, 0.0)
    checkpoints.set_ttl(prolonged, 3600, 0.0)
    checkpoints.expire(99.0)
    assert len(checkpoints.of_run("run")) == 3
    checkpoints.expire(100.0)
    assert [record.name for record in checkpoints.of_run("run")] == ["prolonged", "lifted"]
    checkpoints.expire(1e9)
    assert [record.name for record in checkpoints.of_run("run")] == ["lifted"]


@pytest.mark.parametrize("ttl", [0, 3599, MAX_TTL_S + 1, -1])
def test_a_ttl_out_of_range_names_the_range(ttl):
    with pytest.raises(UserError, match=f"ttl_seconds {ttl} is not between 3600 and"):
        check_ttl(ttl)


@pytest.mark.parametrize("ttl", [None, 3600, MAX_TTL_S])
def test_a_ttl_in_range(ttl):
    check_ttl(ttl)


def test_what_changed_is_in_the_catalogue(checkpoints, catalog):
    record = save(checkpoints)
    checkpoints.publish(record, True)
    checkpoints.set_ttl(checkpoints.find("alice", PATH), 3600, 50.0)
    seen = []
    catalog._checked = lambda record: seen.append(record)
    catalog.load_all()
    assert [(r.public, r.expires_at) for r in seen] == [(True, 3650.0)]


def test_overwriting_makes_a_checkpoint_the_newest(checkpoints):
    save(checkpoints, "a")
    save(checkpoints, "b")
    save(checkpoints, "a", overwrite=True)
    assert [record.name for record in checkpoints.of_tenant("alice")] == ["a", "b"]


def test_what_cannot_be_deleted_stays_listed_and_expires_later(checkpoints, catalog, monkeypatch):
    record = save(checkpoints, expires_at=100.0)
    monkeypatch.setattr(catalog, "delete_checkpoint", lambda *key: 1 / 0)
    for _ in range(2):
        with pytest.raises(ZeroDivisionError):
            checkpoints.expire(100.0)
    assert checkpoints.find("alice", PATH) == record
    assert checkpoints.bytes_of("alice") == 7
    assert Path(record.directory).exists()
    monkeypatch.undo()
    checkpoints.expire(100.0)
    assert checkpoints.of_run("run") == []
    assert checkpoints.bytes_of("alice") == 0
    assert not Path(record.directory).exists()


def test_a_reader_that_ends_spares_the_files_of_a_save_that_is_under_way(checkpoints):
    old = save(checkpoints)
    checkpoints.pin(old.directory)
    directory = checkpoints.reserve("run", "weights", "n", overwrite=True)
    checkpoints.delete(old)
    checkpoints.unpin(directory)
    assert Path(directory).is_dir()
    checkpoints.commit(replace(old, size_bytes=0), 9)
    assert checkpoints.find("alice", PATH).size_bytes == 9
    assert list(Path(directory).iterdir()) == []


@pytest.mark.parametrize("is_read", [False, True])
def test_a_checkpoint_deleted_beside_a_save_that_fails_leaves_no_files(checkpoints, is_read):
    old = save(checkpoints)
    if is_read:
        checkpoints.pin(old.directory)
    directory = checkpoints.reserve("run", "weights", "n", overwrite=True)
    checkpoints.delete(old)
    checkpoints.discard(("run", "weights", "n"), directory)
    assert Path(directory).is_dir() == is_read
    if is_read:
        checkpoints.unpin(directory)
    assert not Path(directory).exists()


def test_what_was_deleted_while_it_was_read_goes_at_the_next_start(tmp_path):
    catalog = Catalog(tmp_path)
    checkpoints = Checkpoints(catalog)
    read, other = save(checkpoints), save(checkpoints, "other")
    checkpoints.pin(read.directory)
    checkpoints.delete(read)
    unlisted = Path(catalog.directory_for("run", "weights", "unlisted"))
    unlisted.mkdir()
    catalog.close()
    catalog = Catalog(tmp_path)
    catalog.load_all()
    assert not Path(read.directory).exists()
    assert Path(other.directory).is_dir()
    assert unlisted.is_dir(), "the rows may be of an older backup"
    catalog.close()
