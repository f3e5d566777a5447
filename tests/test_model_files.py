"""Which weight files count, and which are whole."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest

from twinkle_serve.model_files import (
    INDEX,
    SINGLE,
    DamagedModel,
    check_whole,
    has_weights,
    listed_tensors,
    weight_files,
)


def test_the_single_file_wins_over_an_index_beside_it(tmp_path: Path) -> None:
    assert not has_weights(tmp_path)
    listed = {"x": "b.safetensors", "y": "a.safetensors", "z": "b.safetensors"}
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": listed}))
    assert has_weights(tmp_path)
    assert listed_tensors(tmp_path) == listed
    assert weight_files(tmp_path) == ["a.safetensors", "b.safetensors"]
    (tmp_path / SINGLE).touch()
    assert listed_tensors(tmp_path) == {}
    assert weight_files(tmp_path) == [SINGLE]


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"weight_map": 1}', '{"weight_map": [1]}'])
def test_an_index_that_is_none_is_damage(tmp_path: Path, text: str) -> None:
    (tmp_path / INDEX).write_text(text)
    with pytest.raises(DamagedModel, match=r"index\.json is not a readable index"):
        weight_files(tmp_path)


@pytest.mark.parametrize(
    ("header", "tail", "problem"),
    [
        (b'{"a": {"data_offsets": [0, 4]}}', 4, None),
        (b'{"__metadata__": {"format": "pt"}}', 0, None),
        (b'{"a": {"data_offsets": [0, 4]}}', 3, "a.safetensors has 42 bytes instead of 43: fetch it again"),
        (b'{"a": {"data_offsets": ["0", "4"]}}', 4, "a.safetensors has a damaged header"),
        (b'{"a": 1}', 0, "a.safetensors has a damaged header"),
        (b"[]", 0, "a.safetensors has a damaged header"),
        (b"{", 0, "a.safetensors has a damaged header"),
    ],
)
def test_a_file_is_whole_by_its_header(tmp_path: Path, header: bytes, tail: int, problem: str | None) -> None:
    file = tmp_path / "a.safetensors"
    file.write_bytes(struct.pack("<Q", len(header)) + header + bytes(tail))
    if problem is None:
        return check_whole(file)
    with pytest.raises(DamagedModel) as error:
        check_whole(file)
    assert str(error.value) == problem
