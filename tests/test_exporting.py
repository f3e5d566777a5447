from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.engine.test_peft_format import layout_of, random_block
from twinkle_serve.cli import main
from twinkle_serve.engine.adapter_files import save_adapter
from twinkle_serve.engine.slots import AdapterState
from twinkle_serve.protocol.data import LoraSpec
from twinkle_serve.storage.catalog import Catalog
from twinkle_serve.testing.models import build_tiny_llama

RUN = "session-1:train:0"


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """A configuration whose storage has one checkpoint, "a", and one export for the cookbook, "b.tinker"."""
    base = build_tiny_llama(tmp_path, tie_word_embeddings=False)
    layout = layout_of(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32))
    catalog = Catalog(tmp_path / "store")
    state = AdapterState(LoraSpec(3), random_block(layout, LoraSpec(3)))
    for kind, name, form in (("weights", "a", {}), ("external_weights", "b.tinker", {"layout": "tinker"})):
        manifest = {"base_model": "llama", **form}
        save_adapter(catalog.directory_for(RUN, kind, name), state, layout, "llama", manifest)
    catalog.close()
    tree = {"models": [{"name": "llama", "path": str(base)}], "storage": {"root": str(tmp_path / "store")}}
    (tmp_path / "config.yaml").write_text(json.dumps(tree))
    return tmp_path / "config.yaml"


def test_an_adapter_and_a_merged_model(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = f"tinker://{RUN}/weights/a"
    assert main(["export", str(config), path, str(tmp_path / "adapter")]) == 0
    assert sorted(p.name for p in (tmp_path / "adapter").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    assert main(["export", str(config), path, str(tmp_path / "merged"), "--merged"]) == 0
    AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert "tensors changed" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("path", "words"),
    [
        (f"tinker://{RUN}/weights/nothing", "no checkpoint"),
        ("/etc/passwd", "not of the form"),
        ("tinker://../weights/a", "not of the form"),
        (f"tinker://{RUN}/external_weights/b.tinker", "other tools"),
    ],
)
def test_what_cannot_be_exported(
    config: Path, tmp_path: Path, path: str, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["export", str(config), path, str(tmp_path / "out"), "--merged"]) == 1
    assert words in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_nothing_is_overwritten(config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for merged in ([], ["--merged"]):
        assert main(["export", str(config), f"tinker://{RUN}/weights/a", str(tmp_path), *merged]) == 1
        assert "exists" in capsys.readouterr().err
