"""Other releases of the tinker SDK, each in a directory to put first on PYTHONPATH.

Knows how to fetch a release. Everything else it needs comes from the environment that the caller runs in.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from twinkle_serve.testing.cache import build_once


def sdk_release(root: Path, version: str) -> Path:
    """The directory below ``root`` that holds ``tinker==version``, installed if it is not there yet."""
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--quiet", "--no-deps"]

    def install(directory: Path) -> None:
        subprocess.run([*pip, "--target", str(directory), f"tinker=={version}"], check=True)

    return build_once(root, f"sdk-{version}", install)
