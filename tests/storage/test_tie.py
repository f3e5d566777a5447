"""A disk that is away or a wrong URL costs nothing: it is said, and all is there once both are right."""

from __future__ import annotations

import sqlite3
from pathlib import Path

import pytest

from twinkle_serve.protocol.data import LoraSpec
from twinkle_serve.storage.catalog import Catalog
from twinkle_serve.storage.checkpoints import write_checkpoint
from twinkle_serve.storage.journal import Journal
from twinkle_serve.storage.records import CheckpointRecord
from twinkle_serve.storage.states import StateFiles
from twinkle_serve.storage.tie import ID_FILE, NotTied

RUN = "session-1:train:0"


def _with_checkpoints(root: Path, url: str | None, *names: str) -> None:
    catalog = Catalog(root, url)
    for at, name in enumerate(names):
        directory = catalog.directory_for(RUN, "weights", name)
        size = write_checkpoint(directory, {"a.bin": b"12345"}, {})
        spec = LoraSpec(4)
        catalog.put_checkpoint(
            CheckpointRecord(RUN, "weights", name, "t", "m", spec, directory, size, float(at))
        )
    catalog.close()


def _listed(root: Path, url: str | None = None) -> list[str]:
    catalog = Catalog(root, url)
    try:
        return [record.name for record in catalog.load_all().checkpoints]
    finally:
        catalog.close()


def _started(root: Path, url: str | None = None) -> int:
    journal = Journal(root, url)
    journal.close()
    return journal.epoch


def test_a_catalogue_elsewhere_waits_for_the_disk_of_its_checkpoints(tmp_path: Path) -> None:
    root, url = tmp_path / "store", f"sqlite:///{tmp_path / 'catalog.sqlite'}"
    _with_checkpoints(root, url, "a", "b")
    root.rename(tmp_path / "away")
    for _ in range(2):
        with pytest.raises(NotTied, match="is the disk mounted"):
            Catalog(root, url)
    root.mkdir()  # the place of the mount
    with pytest.raises(NotTied, match=r"checkpoints has no storage\.id"):
        Catalog(root, url)
    assert list(root.iterdir()) == []
    root.rmdir()
    (tmp_path / "away").rename(root)
    assert _listed(root, url) == ["a", "b"]


def test_checkpoints_on_a_disk_of_their_own_are_waited_for_too(tmp_path: Path) -> None:
    _with_checkpoints(tmp_path, None, "a", "b")
    (tmp_path / "checkpoints").rename(tmp_path / "away")
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(NotTied):
        Catalog(tmp_path)
    (tmp_path / "checkpoints").rmdir()
    (tmp_path / "away").rename(tmp_path / "checkpoints")
    assert _listed(tmp_path) == ["a", "b"]


def test_a_row_stays_while_the_directory_around_its_checkpoint_is_away(tmp_path: Path) -> None:
    _with_checkpoints(tmp_path, None, "a", "b")
    folder = tmp_path / "checkpoints" / RUN.replace(":", "%3A")
    folder.rename(tmp_path / "away")
    assert _listed(tmp_path) == ["a", "b"]
    (tmp_path / "away").rename(folder)
    assert _listed(tmp_path) == ["a", "b"]


@pytest.mark.parametrize("kind", ["catalog", "journal"])
def test_an_empty_database_is_not_taken_for_that_of_files_that_are_there(tmp_path: Path, kind: str) -> None:
    url = f"sqlite:///{tmp_path / 'mistyped.sqlite'}"
    _with_checkpoints(tmp_path, None, "a")
    _started(tmp_path)
    (Path(StateFiles(tmp_path).path("x"))).write_bytes(b"a run's state")
    for _ in range(2):
        with pytest.raises(NotTied, match=f"but the {kind} database .* is empty: is it the right one"):
            Catalog(tmp_path, url) if kind == "catalog" else _started(tmp_path, url)
    assert _listed(tmp_path) == ["a"]
    assert _started(tmp_path) == 2


def test_another_catalogue_is_refused_for_the_snapshots_of_samplers_as_well(tmp_path: Path) -> None:
    _with_checkpoints(tmp_path, None)
    Path(StateFiles(tmp_path).path("sampler.frozen")).write_bytes(b"")
    with pytest.raises(NotTied, match="runs holds files, but the catalog database"):
        Catalog(tmp_path, f"sqlite:///{tmp_path / 'mistyped.sqlite'}")


def test_the_journal_of_another_root_is_not_fenced(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'shared.sqlite'}"
    assert _started(tmp_path / "one", url) == 1
    _started(tmp_path / "two")
    with pytest.raises(NotTied, match="belongs to another one"):
        Journal(tmp_path / "two", url)
    with pytest.raises(NotTied, match="has no"):
        Journal(tmp_path / "three", url)
    assert not (tmp_path / "three").exists()
    assert _started(tmp_path / "one", url) == 2


def test_a_root_of_before_there_were_ids_gets_one(tmp_path: Path) -> None:
    _with_checkpoints(tmp_path, None, "a")
    _started(tmp_path)
    for name, folder in (("catalog", "checkpoints"), ("journal", "runs")):
        _forget_tie(tmp_path / f"{name}.sqlite")
        (tmp_path / folder / ID_FILE).unlink()
    assert _listed(tmp_path) == ["a"]
    assert _started(tmp_path) == 2
    assert (tmp_path / "checkpoints" / ID_FILE).exists()


def test_a_start_that_died_between_the_file_and_the_row_goes_on(tmp_path: Path) -> None:
    _started(tmp_path)
    (tmp_path / "journal.sqlite").unlink()
    assert _started(tmp_path) == 1


def test_the_sweep_of_states_leaves_the_id(tmp_path: Path) -> None:
    _started(tmp_path)
    StateFiles(tmp_path).sweep([])
    assert _started(tmp_path) == 2


def _forget_tie(database: Path) -> None:
    with sqlite3.connect(database) as connection:
        connection.execute("DROP TABLE storage_ties")
    connection.close()
