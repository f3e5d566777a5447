"""What a running coordinator can take up as it is, and what needs another one."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from twinkle_serve.cluster.deployment import Deployment
from twinkle_serve.config import Config

MODEL = {"name": "a", "path": "/a"}


def _deployed(*models: dict[str, Any], **rest: Any) -> Deployment:
    return Deployment(Config.model_validate({"models": list(models), **rest}))


@pytest.mark.parametrize(
    "after",
    [
        _deployed(MODEL),
        _deployed(MODEL | {"groups": 3}),
        _deployed(MODEL, {"name": "b", "path": "/b"}),
        _deployed({"name": "b", "path": "/b"}, MODEL | {"groups": 2}),
        _deployed(MODEL, http={"replicas": 7}),
        _deployed(MODEL, ray={"orphan_exit_s": 7}),
    ],
)
def test_what_only_adds_is_taken_up(after: Deployment) -> None:
    assert _deployed(MODEL).grows_to(after)


@pytest.mark.parametrize(
    "after",
    [
        _deployed({"name": "b", "path": "/b"}),
        _deployed(MODEL | {"path": "/elsewhere"}),
        _deployed(MODEL | {"groups": 2, "max_rank": 8}),
        _deployed(MODEL, storage={"root": "/elsewhere"}),
        _deployed(MODEL, limits={"session_expiry_s": 700}),
        _deployed(MODEL, monitoring={"log_level": "DEBUG"}),
        _deployed(MODEL, monitoring={"otlp_endpoint": "http://127.0.0.1:4318/v1/traces"}),
        replace(_deployed(MODEL), version="0.0.0"),
    ],
)
def test_everything_else_needs_another_coordinator(after: Deployment) -> None:
    assert not _deployed(MODEL).grows_to(after)


def test_a_group_that_only_samples_does_not_become_one_that_trains() -> None:
    sampling = MODEL | {"sampling_groups": 1}
    assert _deployed(sampling | {"groups": 2}).grows_to(_deployed(sampling | {"groups": 2}))
    assert not _deployed(sampling | {"groups": 2}).grows_to(_deployed(sampling | {"groups": 3}))


def test_nothing_shrinks() -> None:
    assert not _deployed(MODEL | {"groups": 2}).grows_to(_deployed(MODEL))
    assert not _deployed(MODEL, {"name": "b", "path": "/b"}).grows_to(_deployed(MODEL))


def test_the_later_deployment_is_the_newer_one() -> None:
    first, second = _deployed(MODEL), _deployed(MODEL)
    assert first.deployed_at <= second.deployed_at
