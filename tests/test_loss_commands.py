"""`twinkle-serve losses`: the configuration file is edited as text, and only if that works."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import yaml

from twinkle_serve.cli import main
from twinkle_serve.config import load_config

EXAMPLE = Path(__file__).parent.parent / "examples" / "losses" / "focal_cross_entropy"
BARE = "# ours\nmodels:\n  - {name: m, path: /m}  # the model\n"


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "config.yaml"
    path.write_text(BARE)
    return path


def losses(config: Path, *arguments: str | Path) -> int:
    return main(["losses", str(config), *map(str, arguments)])


@pytest.mark.parametrize("tail", ["", "losses:\n  custom_loss_server_side: false\n"])
def test_a_loss_is_added_listed_and_verified(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], tail: str
) -> None:
    config.write_text(BARE + tail)
    assert losses(config, "add", EXAMPLE) == 0
    text = config.read_text()
    assert text.startswith(BARE)
    (loss,) = load_config(config).losses.whitelist
    assert loss.name == "focal_cross_entropy"
    assert loss.sha256 in text
    assert load_config(config).losses.custom_loss_server_side is ("false" not in tail)
    second = shutil.copytree(EXAMPLE, tmp_path / "second loss")
    (second / "loss.json").write_text('{"name": "second", "inputs": ["weights"], "settings": {"gamma": 1}}')
    assert losses(config, "add", second) == 0
    assert {each.name for each in load_config(config).losses.whitelist} == {loss.name, "second"}
    capsys.readouterr()
    assert losses(config, "list") == 0
    listed = capsys.readouterr().out
    assert "cross_entropy\tbuilt in" in listed
    assert loss.sha256 in listed
    assert losses(config, "verify") == 0
    assert capsys.readouterr().out == "second: fine\nfocal_cross_entropy: fine\n"


def test_what_changed_since_is_not_verified(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = shutil.copytree(EXAMPLE, tmp_path / "own")
    assert losses(config, "add", own) == 0
    with (own / "loss.py").open("a") as file:
        file.write("\n")
    assert losses(config, "verify") == 1
    assert "was allowed" in capsys.readouterr().err


def test_a_refusal_leaves_the_file_as_it_was(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert losses(config, "add", EXAMPLE) == 0
    before = config.read_text()
    assert losses(config, "add", EXAMPLE) == 1
    assert "already" in capsys.readouterr().err
    broken = shutil.copytree(EXAMPLE, tmp_path / "broken")
    (broken / "loss.json").write_text('{"name": "other"}')
    assert losses(config, "add", broken) == 1
    assert "KeyError" in capsys.readouterr().err
    assert losses(config, "add") == 1
    assert config.read_text() == before


def test_a_file_that_cannot_be_edited_is_left_alone(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = f"{BARE}losses: {{whitelist: []}}\n"
    config.write_text(text)
    assert losses(config, "add", EXAMPLE) == 1
    told = capsys.readouterr().err
    assert config.read_text() == text
    item = told[told.index("    - ") :]
    assert yaml.safe_load(item)[0]["name"] == "focal_cross_entropy"
