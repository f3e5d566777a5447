"""Losses of the whitelist: loaded from hashed bytes, tried, computed like any other, or refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from twinkle_serve.engine import losses as losses_module
from twinkle_serve.engine.losses import compute_loss
from twinkle_serve.engine.whitelist import checked_formula, load_losses
from twinkle_serve.hub.losses import LossSourceError, fetch_loss
from twinkle_serve.loss_config import WhitelistedLoss
from twinkle_serve.protocol.errors import UserError

EXAMPLE = Path(__file__).parent.parent.parent / "examples" / "losses" / "focal_cross_entropy"


@pytest.fixture(autouse=True)
def _nothing_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(losses_module, "_ADDED", {})


def write(directory: Path, code: str, **terms: Any) -> Path:
    directory.mkdir(exist_ok=True)
    (directory / "loss.json").write_text(json.dumps({"name": "mine", **terms}))
    (directory / "loss.py").write_text(code)
    return directory


def entry(path: Path, **changes: Any) -> WhitelistedLoss:
    source = fetch_loss(str(path), None)
    return WhitelistedLoss(**source.terms.model_dump(), path=str(path), sha256=source.sha256).model_copy(
        update=changes
    )


def test_the_example_is_computed_like_a_built_in_loss() -> None:
    load_losses([entry(EXAMPLE)])
    logprobs = torch.tensor([-0.1, -2.0, -3.0], requires_grad=True)
    weights = torch.tensor([1.0, 0.5, 0.0])
    found = compute_loss("focal_cross_entropy", logprobs, {"weights": weights}, torch.tensor([2, 1]), {})
    (gradient,) = torch.autograd.grad(found.value, logprobs)
    doubt = (1 - logprobs.detach().exp()) ** 2
    torch.testing.assert_close(gradient, -doubt * weights)
    assert float(found.value.detach()) == pytest.approx(float((gradient * logprobs.detach()).sum()))
    assert float(found.metrics["doubt:sum"]) == pytest.approx(float((doubt * weights).sum()))
    assert found.metrics["loss:sum"] == found.value
    harder = compute_loss(
        "focal_cross_entropy", logprobs, {"weights": weights}, torch.tensor([2, 1]), {"gamma": 0.0}
    )
    assert float(harder.value.detach()) == pytest.approx(0.1 + 1.0)


def test_a_change_of_one_byte_is_refused_before_anything_runs(tmp_path: Path) -> None:
    mark = tmp_path / "ran"
    path = write(tmp_path / "loss", "def loss(logprobs, *_):\n    return logprobs.sum(), {}\n")
    allowed = entry(path)
    (path / "loss.py").write_text(f"open({str(mark)!r}, 'w')\n{(path / 'loss.py').read_text()}")
    with pytest.raises(LossSourceError, match="sha256"):
        load_losses([allowed])
    assert not mark.exists()
    assert losses_module._ADDED == {}


def test_the_configuration_must_say_what_the_manifest_says(tmp_path: Path) -> None:
    path = write(tmp_path / "loss", "def loss(logprobs, *_):\n    return logprobs.sum(), {}\n", inputs=["a"])
    with pytest.raises(LossSourceError, match="something else"):
        load_losses([entry(path, inputs=["b"])])


@pytest.mark.parametrize(
    ("code", "words"),
    [
        ("def loss(:", "SyntaxError"),
        ("raise KeyError('at import')", "KeyError"),
        ("x = 1", "no attribute 'loss'"),
        ("def loss(logprobs, *_):\n    return logprobs, {}", "scalar tensor"),
        ("def loss(logprobs, *_):\n    return 1.0, {}", "scalar tensor"),
        ("def loss(logprobs, *_):\n    return logprobs.detach().sum(), {}", "depends on logprobs"),
        ("def loss(logprobs, *_):\n    return logprobs.mean(), {}", "one by one"),
        ("def loss(logprobs, *_):\n    return logprobs.sum(), {'a:sum': 1}", "cannot name a metric"),
        ("def loss(logprobs, *_):\n    return logprobs.sum(), {'loss': 1}", "cannot name a metric"),
        ("def loss(logprobs, inputs, *_):\n    return (logprobs * inputs['b']).sum(), {}", "KeyError"),
    ],
    ids=lambda each: each[-40:],
)
def test_a_loss_that_cannot_work_is_found_in_the_trial(tmp_path: Path, code: str, words: str) -> None:
    path = write(tmp_path / "loss", code)
    with pytest.raises(LossSourceError, match=words):
        checked_formula(fetch_loss(str(path), None))


def test_what_fails_on_data_is_the_requests_error(tmp_path: Path) -> None:
    code = "def loss(logprobs, inputs, lengths, settings):\n    assert len(logprobs) < 6, 'long'\n"
    path = write(tmp_path / "loss", f"{code}    return logprobs.sum(), {{}}\n")
    load_losses([entry(path)])
    logprobs = torch.zeros(6, requires_grad=True)
    with pytest.raises(UserError, match="loss mine: AssertionError: long"):
        compute_loss("mine", logprobs, {}, torch.tensor([6]), {})
