"""Weight files: found by tensor, read in slices, and refused by name when they are not whole."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from twinkle_serve.config import ModelConfig
from twinkle_serve.engine.base_model import UnsupportedModel, load_base_model
from twinkle_serve.engine.sharding.files import CHECKSUMS, INDEX, DamagedModel, WeightFiles

HEAD = "lm_head.weight"


@pytest.fixture
def copy(tiny_moe: Path, tmp_path: Path) -> Path:
    """The tiny model in two files with an index."""
    directory = tmp_path / "model"
    shutil.copytree(tiny_moe, directory)
    tensors = load_file(directory / "model.safetensors")
    (directory / "model.safetensors").unlink()
    parts = {"a.safetensors": {HEAD: tensors.pop(HEAD)}, "b.safetensors": tensors}
    for name, part in parts.items():
        save_file(part, directory / name, metadata={"format": "pt"})
    weight_map = {key: name for name, part in parts.items() for key in part}
    (directory / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return directory


def load(directory: Path, **fields: bool) -> None:
    load_base_model(ModelConfig(name="m", path=str(directory), num_threads=1, **fields), directory)


def test_tensors_and_slices_of_them(copy: Path, tiny_moe: Path) -> None:
    files, expected = WeightFiles(copy), load_file(tiny_moe / "model.safetensors")
    assert files.names == expected.keys()
    assert HEAD in files
    assert files.shape(HEAD) == expected[HEAD].shape
    assert torch.equal(files.read(HEAD), expected[HEAD])
    assert torch.equal(files.read(HEAD, 3, 7), expected[HEAD][3:7])
    load(copy)


def test_a_missing_file_is_named(copy: Path) -> None:
    (copy / "b.safetensors").unlink()
    with pytest.raises(DamagedModel, match=r"b\.safetensors is missing"):
        load(copy)


def test_a_truncated_file_is_named(copy: Path) -> None:
    path = copy / "b.safetensors"
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(DamagedModel, match=r"b\.safetensors is cut short"):
        load(copy)


def test_a_tensor_that_only_the_index_has_is_named(copy: Path) -> None:
    index = json.loads((copy / INDEX).read_text())
    index["weight_map"]["model.norm.bias"] = "a.safetensors"
    (copy / INDEX).write_text(json.dumps(index))
    with pytest.raises(DamagedModel, match=r"a\.safetensors lacks model\.norm\.bias"):
        load(copy)


def test_an_index_that_is_no_index_is_named(copy: Path) -> None:
    (copy / INDEX).write_text("[]")
    with pytest.raises(DamagedModel, match="not a readable index"):
        load(copy)


def test_checksums_are_compared_if_asked_for(copy: Path) -> None:
    with pytest.raises(DamagedModel, match="SHA256SUMS is missing"):
        load(copy, checksums=True)
    names = ["a.safetensors", "b.safetensors"]
    lines = [f"{hashlib.sha256((copy / name).read_bytes()).hexdigest()}  {name}\n" for name in names]
    (copy / CHECKSUMS).write_text("".join(lines))
    load(copy, checksums=True)
    changed = bytearray((copy / "b.safetensors").read_bytes())
    changed[-1] ^= 1
    (copy / "b.safetensors").write_bytes(changed)
    load(copy)
    with pytest.raises(DamagedModel, match=r"b\.safetensors does not have the sha256"):
        load(copy, checksums=True)
    WeightFiles(copy).verify(0, 2)  # the other file is this rank's
    with pytest.raises(DamagedModel):
        WeightFiles(copy).verify(1, 2)


def test_a_directory_without_weights_is_refused(copy: Path) -> None:
    for path in [*copy.glob("*.safetensors"), copy / INDEX]:
        path.unlink()
    with pytest.raises((OSError, UnsupportedModel), match="safetensors"):
        load(copy)
