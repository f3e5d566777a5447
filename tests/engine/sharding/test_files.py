"""Weight files: found by tensor, read in slices, and refused by name when they are not whole."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from twinkle_serve.config import ModelConfig
from twinkle_serve.engine.base_model import UnsupportedModel, load_base_model
from twinkle_serve.engine.sharding.files import CHECKSUMS, WeightFiles
from twinkle_serve.engine.sharding.place import RankPlace
from twinkle_serve.engine.sharding.ranks import Ranks
from twinkle_serve.model_files import INDEX, SINGLE, DamagedModel
from twinkle_serve.testing.crew import Crew

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


def write_checksums(directory: Path) -> None:
    names = ["a.safetensors", "b.safetensors"]
    lines = [f"{hashlib.sha256((directory / name).read_bytes()).hexdigest()}  {name}\n" for name in names]
    (directory / CHECKSUMS).write_text("".join(lines))


def flip_last_bit(path: Path) -> None:
    changed = bytearray(path.read_bytes())
    changed[-1] ^= 1
    path.write_bytes(changed)


def test_tensors_and_slices_of_them(copy: Path, tiny_moe: Path) -> None:
    files, expected = WeightFiles(copy), load_file(tiny_moe / "model.safetensors")
    assert files.names == expected.keys()
    assert HEAD in files
    assert files.shape(HEAD) == expected[HEAD].shape
    assert torch.equal(files.read(HEAD), expected[HEAD])
    assert torch.equal(files.read(HEAD, 3, 7), expected[HEAD][3:7])
    load(copy)


def test_of_both_forms_in_one_directory_the_one_that_transformers_reads_counts(
    copy: Path, tiny_moe: Path
) -> None:
    tensors = load_file(tiny_moe / SINGLE)
    save_file(tensors | {HEAD: tensors[HEAD] + 1}, copy / SINGLE, metadata={"format": "pt"})
    read = AutoModelForCausalLM.from_pretrained(copy).state_dict()[HEAD]
    assert torch.equal(read, tensors[HEAD] + 1)
    assert torch.equal(WeightFiles(copy).read(HEAD), read)
    digest = hashlib.sha256((copy / SINGLE).read_bytes()).hexdigest()
    (copy / CHECKSUMS).write_text(f"{digest}  {SINGLE}\n")
    load(copy, checksums=True)


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
    write_checksums(copy)
    load(copy, checksums=True)
    flip_last_bit(copy / "b.safetensors")
    load(copy)
    with pytest.raises(DamagedModel, match=r"b\.safetensors does not have the sha256"):
        load(copy, checksums=True)


class WatchedRanks(Ranks):
    """What this rank asked of its peers until checksums were compared, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[object] = []

    def wait_for_all(self, timeout_s: float) -> None:
        self.asked.append(timeout_s)

    def sharing(self, thing: object) -> tuple[int, int]:
        self.asked.append("sharing")
        return super().sharing(thing)


def test_checksums_wait_for_the_slowest_download_as_long_as_loading_may_take(copy: Path) -> None:
    write_checksums(copy)
    config = ModelConfig(name="m", path=str(copy), num_threads=1, checksums=True, load_deadline_s=1234)
    ranks = WatchedRanks()
    load_base_model(config, copy, ranks)
    assert ranks.asked[:2] == [1234, "sharing"]


def verify(place: RankPlace, directory: Path) -> str:
    """What is wrong with the files that this rank looks at."""
    ranks = Ranks.join(place, torch.device("cpu"))
    try:
        WeightFiles(directory).verify(ranks)
    except DamagedModel as error:
        return str(error).removeprefix(f"{directory}/").split()[0]
    return ""


def test_ranks_divide_the_files_of_a_directory_that_they_share_and_check_each_copy(
    copy: Path, tmp_path: Path, two: Crew
) -> None:
    write_checksums(copy)
    other = tmp_path / "other"
    shutil.copytree(copy, other)
    for name in ("a.safetensors", "b.safetensors"):
        flip_last_bit(other / name)
    assert two.run_each(verify, [[other], [other]]) == ["a.safetensors", "b.safetensors"]
    assert two.run_each(verify, [[copy], [other]]) == ["", "a.safetensors"]
    flip_last_bit(other / "a.safetensors")
    assert two.run_each(verify, [[other], [copy]]) == ["b.safetensors", ""]


def test_a_directory_without_weights_is_refused(copy: Path) -> None:
    for path in [*copy.glob("*.safetensors"), copy / INDEX]:
        path.unlink()
    with pytest.raises((OSError, UnsupportedModel), match="safetensors"):
        load(copy)
