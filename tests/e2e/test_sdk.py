"""The real SDK from another process against a real server: everything once, and the numbers hang together."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from twinkle_serve.testing.server import RunningServer

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", params=["moe", "llama"])
def seen(
    request: pytest.FixtureRequest, server: RunningServer, sdk_program_seen: Callable[..., dict[str, Any]]
) -> dict[str, Any]:
    return sdk_program_seen(server.url, request.param)


def test_both_models_are_offered(seen: dict[str, Any]) -> None:
    assert sorted(seen["models"]) == ["llama", "moe"]


def test_a_fresh_adapter_is_the_base_model(seen: dict[str, Any]) -> None:
    assert seen["losses"][0] == seen["base_loss"]
    assert -sum(seen["base_sample"]["scored"][1:]) == pytest.approx(seen["base_loss"], abs=1e-4)


def test_training_lowers_the_loss(seen: dict[str, Any]) -> None:
    losses = seen["losses"]
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < 0.7 * losses[0]


def test_a_custom_loss_sees_the_logprobs(seen: dict[str, Any]) -> None:
    assert seen["custom"]["loss:sum"] == pytest.approx(sum(x**2 for x in seen["logprobs"]), rel=0.2)


def test_forward_sampler_and_scores_agree(seen: dict[str, Any]) -> None:
    assert -sum(seen["logprobs"]) == pytest.approx(seen["loss"], rel=1e-5)
    assert seen["named_sample"]["scored"][1:] == pytest.approx(seen["logprobs"], abs=1e-4)
    assert seen["snapshot_before"] == seen["named_sample"]
    assert seen["named_sample"]["tokens"] != seen["base_sample"]["tokens"]


def test_greedy_samples_are_equal_and_as_long_as_asked(seen: dict[str, Any]) -> None:
    one, other = seen["named_sample"]["tokens"]
    assert one == other
    assert len(one) == 8


def test_a_snapshot_never_changes(seen: dict[str, Any]) -> None:
    assert seen["snapshot_after"] == seen["snapshot_before"]


def test_resuming_with_the_optimizer_is_going_on(seen: dict[str, Any]) -> None:
    assert seen["resumed_losses"] == seen["more_losses"]
    assert seen["reset_losses"][0] == seen["more_losses"][0]
    assert seen["reset_losses"][1] != seen["more_losses"][1]
    assert seen["reloaded_loss"] == seen["resumed_loss"] == seen["loss"]


def test_checkpoints_are_listed_described_and_deleted(seen: dict[str, Any]) -> None:
    assert [path.split("/", 3)[3] for path in seen["paths"]] == ["weights/state", "sampler_weights/sampler"]
    assert seen["listed"] == ["sampler_weights/sampler", "weights/state"]
    assert seen["left"] == ["weights/state"]
    assert seen["info"] == 8
