"""What the doctor finds: each kind of trouble once, and nothing where nothing is wrong."""

from __future__ import annotations

import json
import shutil
import socket
import struct
import tempfile
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

from twinkle_serve import doctor
from twinkle_serve.cli import main
from twinkle_serve.config import Config
from twinkle_serve.doctor import Finding, examine, verdict

Change = Callable[[Path], None]


@pytest.fixture
def model(tmp_path: Path, tiny_llama: Path) -> Path:
    return Path(shutil.copytree(tiny_llama, tmp_path / "model"))


def make(model: Path, free_port: int = 0, **sections: Any) -> Config:
    tree: dict[str, Any] = {
        "models": [{"name": "tiny", "path": str(model), "disk_page_bytes": 0}],
        "storage": {"root": str(model.parent / "data"), "journal_max_bytes": 2**20},
    }
    if free_port:
        tree["http"] = {"port": free_port}
    return Config.model_validate(tree | sections)


def troubles(config: Config) -> list[Finding]:
    return [finding for finding in examine(config) if finding.level != "ok"]


def test_nothing_is_wrong_with_a_good_machine(model: Path, free_port: Callable[[], int]) -> None:
    findings = list(examine(make(model, free_port())))
    # Other things may be short on the machine that runs this, but nothing is bad.
    assert [finding for finding in findings if finding.level == "bad"] == []
    assert verdict(findings) is None
    assert {"python", "packages", "ports", "disk", "memory", "files", "gpus", "model"} <= {
        f.what for f in findings
    }
    (packages,) = (f for f in findings if f.what == "packages")
    assert f"torch {metadata.version('torch')}" in packages.text


def test_a_port_in_use_is_named(model: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        config = make(model, port, ray={"metrics_port": port})
        texts = [finding.text for finding in troubles(config) if finding.what == "ports"]
    assert len(texts) == 2
    assert f"http.port {port} on 127.0.0.1 cannot be used: Address already in use" in texts


def truncate(directory: Path) -> None:
    (file,) = directory.glob("*.safetensors")
    file.write_bytes(file.read_bytes()[:-100])


def cut_header(directory: Path) -> None:
    (file,) = directory.glob("*.safetensors")
    file.write_bytes(file.read_bytes()[:20])


def damage_header(directory: Path) -> None:
    (file,) = directory.glob("*.safetensors")
    data = bytearray(file.read_bytes())
    data[8] = ord("?")
    file.write_bytes(data)


def empty_file(directory: Path) -> None:
    (file,) = directory.glob("*.safetensors")
    file.write_bytes(b"")


def spoil_index(directory: Path) -> None:
    (directory / "model.safetensors").rename(directory / "model-00001-of-00001.safetensors")
    (directory / "model.safetensors.index.json").write_text("[]")


def lose_shard(directory: Path) -> None:
    (directory / "model.safetensors").unlink()
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors"}}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))


def no_weights(directory: Path) -> None:
    for file in directory.glob("*.safetensors"):
        file.unlink()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (truncate, "bytes instead of"),
        (cut_header, "not a whole safetensors file"),
        (damage_header, "damaged header"),
        (empty_file, "not a whole safetensors file"),
        (lose_shard, "model-00001-of-00002.safetensors is missing"),
        (no_weights, "no *.safetensors files"),
        (lambda d: (d / "config.json").unlink(), "no config.json"),
        (lambda d: (d / "config.json").write_text("{"), "config.json is not a JSON object"),
        (lambda d: (d / "config.json").write_text("[]"), "config.json is not a JSON object"),
        (lambda d: (d / "config.json").write_text("{}"), "names no architecture"),
        (spoil_index, "index.json cannot be read"),
        (lambda d: shutil.rmtree(d), "is not a directory"),
    ],
)
def test_damaged_model_files_are_found(model: Path, change: Change, words: str) -> None:
    change(model)
    found = [
        finding for finding in examine(make(model)) if finding.what == "model" and finding.level == "bad"
    ]
    assert any(words in finding.text for finding in found), found


def test_an_index_beside_the_one_file_that_is_loaded_does_not_count(model: Path) -> None:
    (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "gone.safetensors"}}))
    assert not [finding for finding in troubles(make(model)) if finding.level == "bad"]


def test_a_header_that_claims_to_be_huge(model: Path) -> None:
    (file,) = model.glob("*.safetensors")
    file.write_bytes(struct.pack("<Q", 2**62) + b"{}")
    assert any("not a whole" in finding.text for finding in troubles(make(model)))


def test_a_missing_tokenizer_is_a_warning(model: Path) -> None:
    (model / "tokenizer.json").unlink()
    (finding,) = (f for f in troubles(make(model)) if f.what == "model")
    assert finding.level == "warn"
    assert "get_tokenizer" in finding.text


def test_a_storage_root_that_cannot_be_written(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(**_: Any) -> Any:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(doctor.tempfile, "TemporaryFile", refuse)
    (finding,) = (f for f in troubles(make(model)) if f.what == "disk")
    assert (finding.level, "Permission denied" in finding.text) == ("bad", True)


@pytest.mark.parametrize(("free", "level"), [(10**6, "bad"), (2 * 10**9, "warn"), (10**13, "ok")])
def test_room_on_disk(model: Path, monkeypatch: pytest.MonkeyPatch, free: int, level: str) -> None:
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda path: usage._replace(free=free))
    config = make(model, storage={"root": str(model.parent), "journal_max_bytes": 16 * 2**30})
    (finding,) = (f for f in examine(config) if f.what == "disk")
    assert finding.level == level


@pytest.mark.parametrize(("free", "level"), [(10**9, "warn"), (10**10, "ok")])
def test_room_for_paged_adapters(model: Path, monkeypatch: pytest.MonkeyPatch, free: int, level: str) -> None:
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda path: usage._replace(free=free))
    pages = model.parent / "not" / "yet"
    entry = {"name": "tiny", "path": str(model), "page_dir": str(pages), "disk_page_bytes": 2**30}
    config = make(model, models=[entry | {"groups": 2}])
    (finding,) = (f for f in examine(config) if f.what == "pages")
    assert finding.level == level
    assert str(pages) in finding.text


@pytest.mark.parametrize(
    ("url", "level"),
    [("sqlite://", "ok"), ("sqlite:////nowhere/at/all.db", "bad"), ("nonsense://x", "bad"), ("x", "bad")],
)
def test_databases_are_tried(model: Path, url: str, level: str) -> None:
    config = make(model, storage={"root": str(model.parent), "journal_url": url})
    (finding,) = (f for f in examine(config) if f.what == "database")
    assert finding.level == level
    assert "storage.journal_url" in finding.text


def test_a_package_that_is_missing_or_too_old(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    needed = ["ray>=99", "no-such-package>=1", "httpx>=0.1", 'deepspeed>=99; extra == "sharding"']
    monkeypatch.setattr(doctor.metadata, "requires", lambda name: needed)
    texts = [f.text for f in troubles(make(model)) if f.what == "packages"]
    assert len(texts) == 2
    assert texts[0].endswith("ray>=99 is needed")
    assert texts[1] == "no-such-package is not installed; no-such-package>=1 is needed"


def test_extras_count_where_they_are_used(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    needed = ['no-such-deepspeed; extra == "sharding"', 'no-such-exporter; extra == "otel"']
    monkeypatch.setattr(doctor.metadata, "requires", lambda name: needed)
    ranks = {"name": "tiny", "path": str(model), "ranks": 2, "sharding": "zero3"}
    monitoring = {"otlp_endpoint": "http://127.0.0.1:4318/v1/traces"}
    config = make(model, models=[ranks], monitoring=monitoring)
    assert len([f for f in troubles(config) if f.what == "packages"]) == 2
    assert [f for f in troubles(make(model)) if f.what == "packages"] == []


def test_gpus_are_counted_against_ranks(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "gpu_names", lambda: ["NVIDIA H100, 81559 MiB"])
    entry = {"name": "tiny", "path": str(model), "device": "cuda"}
    assert not [f for f in troubles(make(model, models=[entry])) if f.what == "gpus"]
    two = [entry, entry | {"name": "other"}]
    (finding,) = (f for f in troubles(make(model, models=two)) if f.what == "gpus")
    assert "2 ranks" in finding.text
    several = [entry | {"ranks": 2, "groups": 3, "sharding": "zero3"}]
    (finding,) = (f for f in troubles(make(model, models=several)) if f.what == "gpus")
    assert "6 ranks" in finding.text


def test_models_that_choose_for_themselves_are_counted_too(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "gpu_names", lambda: ["NVIDIA H100, 81559 MiB"])
    entry = {"name": "tiny", "path": str(model)}
    assert not [f for f in troubles(make(model, models=[entry])) if f.what == "gpus"]
    (finding,) = (f for f in troubles(make(model, models=[entry | {"groups": 2}])) if f.what == "gpus")
    assert "2 ranks are to run on GPUs (models.N.device), but this machine has 1" in finding.text
    two = [entry, entry | {"name": "other"}]
    (finding,) = (f for f in troubles(make(model, models=two)) if f.what == "gpus")
    assert finding.text.startswith("other: too few are left")
    monkeypatch.setattr(doctor, "gpu_names", list)
    assert not [f for f in troubles(make(model, models=two)) if f.what == "gpus"]


def test_a_hub_model_is_not_fetched(model: Path) -> None:
    config = make(model, models=[{"name": "hub", "path": "ms://owner/model"}])
    (finding,) = (f for f in examine(config) if f.what == "model")
    assert finding.level == "ok"
    assert "first start" in finding.text


def test_the_command_prints_all_and_fails_if_something_is_bad(
    model: Path, capsys: pytest.CaptureFixture[str], free_port: Callable[[], int]
) -> None:
    path = model.parent / "config.yaml"
    tree = make(model, free_port()).model_dump(mode="json")
    path.write_text(json.dumps(tree))
    assert main(["doctor", str(path)]) == 0
    assert "all whole" in capsys.readouterr().out
    truncate(model)
    assert main(["doctor", str(path)]) == 1
    printed = capsys.readouterr()
    assert "bad  model" in printed.out
    assert printed.err == "twinkle-serve: 1 problem; the service would not start\n"


def test_a_log_file_that_cannot_be_written_is_found(model: Path) -> None:
    (finding,) = troubles(make(model, monitoring={"log_file": str(model / "config.json" / "log")}))
    assert finding.text.endswith("config.json/log cannot be written: Not a directory")
    assert troubles(make(model, monitoring={"log_file": str(model / "new" / "log")})) == []


def test_haproxy_is_looked_for(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.executable", "/nowhere/python")
    config = make(model, http={"proxy": "haproxy", "port": 1 + 2**15})
    (finding,) = (f for f in troubles(config) if f.what == "proxy")
    assert "/nowhere/twinkle-haproxy is not there" in finding.text


def test_places_that_may_not_be_looked_at_are_findings(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As for a user who has no rights on a directory above them; whoever runs the tests may have all."""
    closed = model.parent / "closed"
    closed.mkdir()
    stat, opened = Path.stat, tempfile.TemporaryFile

    def refused(path: Path, **options: Any) -> Any:
        if closed in path.parents:
            raise PermissionError(13, "Permission denied", str(path))
        return stat(path, **options)

    def unwritable(*, dir: Path) -> Any:
        if dir == closed:
            raise PermissionError(13, "Permission denied", str(dir))
        return opened(dir=dir)

    monkeypatch.setattr(Path, "stat", refused)
    monkeypatch.setattr(tempfile, "TemporaryFile", unwritable)
    entry = {"name": "tiny", "path": str(closed / "model"), "page_dir": str(closed / "pages")}
    findings = troubles(make(model, models=[entry], storage={"root": str(closed / "deep" / "data")}))
    bad = [finding.text for finding in findings if finding.level == "bad"]
    assert bad == [
        f"storage.root {closed}/deep/data cannot be written: Permission denied",
        f"tiny: {closed}/model cannot be read: Permission denied",
    ]
