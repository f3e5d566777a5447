"""Where a base model's files are."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType

import pytest

from twinkle_serve.hub.models import resolve_model


def test_a_local_directory_is_made_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a model").mkdir()
    monkeypatch.chdir(tmp_path)
    assert resolve_model("a model") == (tmp_path / "a model").resolve()
    monkeypatch.setenv("HOME", str(tmp_path))
    assert resolve_model("~/a model") == (tmp_path / "a model").resolve()


def test_a_missing_directory_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere"):
        resolve_model(str(tmp_path / "nowhere"))


def test_a_file_is_not_a_model(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.touch()
    with pytest.raises(FileNotFoundError, match=r"model\.gguf"):
        resolve_model(str(path))


def test_a_hub_reference_is_fetched_at_its_revision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, str | None]] = []

    def snapshot_download(model_id: str, revision: str | None = None) -> str:
        asked.append((model_id, revision))
        return str(tmp_path)

    hub = ModuleType("modelscope")
    hub.snapshot_download = snapshot_download  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "modelscope", hub)
    assert resolve_model("ms://Qwen/Qwen3-0.6B", "v1.0") == tmp_path
    assert resolve_model("ms://Qwen/Qwen3-0.6B") == tmp_path
    assert asked == [("Qwen/Qwen3-0.6B", "v1.0"), ("Qwen/Qwen3-0.6B", None)]


@pytest.mark.parametrize("reference", ["ms://", "ms://name-only", "ms://a/b/c"])
def test_a_malformed_hub_reference_is_refused_before_any_download(reference: str) -> None:
    with pytest.raises(ValueError, match="ms://owner/model"):
        resolve_model(reference)
