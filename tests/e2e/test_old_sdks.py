"""Older releases of the SDK, which speak JSON, see the same numbers as today's."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from twinkle_serve.testing.sdk import sdk_release
from twinkle_serve.testing.server import RunningServer

pytestmark = pytest.mark.slow


def numbers(seen: dict[str, Any]) -> dict[str, Any]:
    """What must not depend on the release: everything but ids, and custom metrics that the SDK renames."""
    # JSON carries as many digits as float32 has, protobuf its bits.
    seen["logprobs"] = np.float32(seen["logprobs"]).tolist()
    return {key: value for key, value in seen.items() if key not in ("paths", "runs", "custom")}


@pytest.mark.parametrize("version", ["0.16.1", "0.7.0"])
def test_an_old_release_sees_the_same(
    version: str, server: RunningServer, models_root: Path, sdk_program_seen: Callable[..., dict[str, Any]]
) -> None:
    old = sdk_program_seen(server.url, "llama", PYTHONPATH=str(sdk_release(models_root, version)))
    new = sdk_program_seen(server.url, "llama")
    assert numbers(old) == numbers(new)
