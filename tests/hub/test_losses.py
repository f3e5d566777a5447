"""Where whitelisted losses come from: local directories and pinned revisions, hashed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from twinkle_serve.hub import losses as module
from twinkle_serve.hub.losses import LossSourceError, digest, fetch_loss, spec_of
from twinkle_serve.loss_config import LossTerms


def write(directory: Path, manifest: str, code: bytes = b"def loss(): ...") -> str:
    directory.mkdir(exist_ok=True)
    (directory / "loss.json").write_text(manifest)
    (directory / "loss.py").write_bytes(code)
    return str(directory)


def test_a_pinned_revision_is_fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = Path(write(tmp_path / "repository", '{"name": "mine", "inputs": ["weights"]}'))
    asked: list[tuple[str, Any]] = []

    def resolve(reference: str, revision: str | None) -> Path:
        asked.append((reference, revision))
        return path

    monkeypatch.setattr(module, "resolve_model", resolve)
    source = fetch_loss("ms://owner/mine", "4f2a")
    assert asked == [("ms://owner/mine", "4f2a")]
    assert source.terms.inputs == ["weights"]
    assert source.code == "def loss(): ..."
    assert source.sha256 == digest((path / "loss.json").read_bytes(), (path / "loss.py").read_bytes())
    with pytest.raises(LossSourceError, match="needs a revision"):
        fetch_loss("ms://owner/mine", None)


def test_both_files_are_hashed_and_where_one_ends() -> None:
    assert len({digest(b"ab", b"c"), digest(b"a", b"bc"), digest(b"", b"abc"), digest(b"c", b"ab")}) == 4
    assert len(digest(b"", b"")) == 64


@pytest.mark.parametrize(
    ("manifest", "words"),
    [
        ("{", "Invalid JSON"),
        ("{}", "name: Field required"),
        ('{"name": "Mine"}', "name: String should match"),
        ('{"name": "mine", "code": "x"}', "code: Extra inputs"),
        ('{"name": "mine", "inputs": ["a b"]}', "inputs.0"),
        ('{"name": "mine", "settings": {"a": "high"}}', "settings.a"),
        ('{"name": "ppo"}', "'ppo' is taken"),
        ('{"name": "custom"}', "'custom' is taken"),
        ('{"name": "stable_reinforce"}', "is taken"),
        ('{"name": "mine", "inputs": ["target_tokens"]}', "target_tokens is always sent"),
        ('{"name": "mine", "optional": ["target_tokens"]}', "target_tokens is always sent"),
        ('{"name": "mine", "inputs": ["b", "a"], "optional": ["a"]}', "a is in inputs and in optional"),
    ],
)
def test_a_manifest_that_is_wrong_is_refused_by_field(tmp_path: Path, manifest: str, words: str) -> None:
    with pytest.raises(LossSourceError, match=words):
        fetch_loss(write(tmp_path / "loss", manifest), None)


def test_what_cannot_be_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(LossSourceError, match="cannot be read"):
        fetch_loss(str(tmp_path / "nowhere"), None)
    with pytest.raises(LossSourceError, match="not UTF-8"):
        fetch_loss(write(tmp_path / "loss", '{"name": "mine"}', b"\xff\xfe"), None)
    monkeypatch.setattr(module, "MAX_BYTES", 20)
    with pytest.raises(LossSourceError, match="at most 20"):
        fetch_loss(write(tmp_path / "loss", '{"name": "mine"}'), None)


def test_the_gateway_checks_by_the_terms() -> None:
    spec = spec_of(LossTerms(name="mine", inputs=["a"], optional=["b"], settings={"gamma": 2}))
    assert spec.inputs == ("target_tokens", "a")
    assert spec.optional == ("b",)
    assert spec.config == {"gamma": 2.0}
