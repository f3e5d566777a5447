from __future__ import annotations

import math

import pytest

from twinkle_serve.protocol.errors import UserError
from twinkle_serve.protocol.losses import LOSSES, TARGETS, complete_config, find_loss


def test_the_served_losses_are_pinned() -> None:
    assert list(LOSSES) == ["cross_entropy", "importance_sampling", "ppo", "cispo", "dro", "gspo"]
    assert all(spec.inputs[0] == TARGETS for spec in LOSSES.values())
    assert [name for name, spec in LOSSES.items() if spec.many_targets] == ["cross_entropy"]


@pytest.mark.parametrize("name", ["", "CROSS_ENTROPY", "os.system", None, 3, ["ppo"]])
def test_an_unknown_loss_is_answered_with_the_list(name: object) -> None:
    with pytest.raises(UserError) as caught:
        find_loss(name)
    for served in LOSSES:
        assert served in str(caught.value)


def test_stable_reinforce_names_the_alternatives() -> None:
    with pytest.raises(UserError, match=r"no public formula.*importance_sampling, ppo, cispo, dro or gspo"):
        find_loss("stable_reinforce")


def test_defaults_complete_a_config() -> None:
    assert complete_config(LOSSES["ppo"], {}) == {"clip_low_threshold": 0.8, "clip_high_threshold": 1.2}
    assert complete_config(LOSSES["cispo"], {"clip_high_threshold": 5}) == {
        "clip_low_threshold": 0.0,
        "clip_high_threshold": 5.0,
    }
    assert complete_config(LOSSES["dro"], {}) == {"beta": 0.05}
    assert complete_config(LOSSES["cross_entropy"], {}) == {}


@pytest.mark.parametrize(
    ("loss", "config", "message"),
    [
        ("cross_entropy", {"beta": 1.0}, "unknown to cross_entropy; its settings: none"),
        ("ppo", {"clip": 1.0}, "its settings: clip_low_threshold, clip_high_threshold"),
        ("ppo", {"clip_low_threshold": math.nan}, "finite"),
        ("ppo", {"clip_low_threshold": math.inf}, "finite"),
        ("ppo", {"clip_low_threshold": "0.5"}, "finite number"),
        ("ppo", {"clip_low_threshold": True}, "finite number"),
        ("dro", {"beta": 10**400}, "finite number"),
        ("dro", {"beta": "x" * 10**4}, "finite number, got '.{79}$"),
        ("ppo", {"clip_low_threshold": None}, "finite number"),
        ("ppo", {"clip_low_threshold": -0.1}, "at least 0"),
        ("ppo", {"clip_low_threshold": 1.5}, "clip_low_threshold 1.5 is above clip_high_threshold 1.2"),
        ("dro", {"beta": -1}, "at least 0"),
    ],
)
def test_a_wrong_config_is_refused(loss: str, config: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        complete_config(LOSSES[loss], config)
