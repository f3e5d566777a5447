"""An old SDK goes before the installed one, which stays what it is."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import tinker

from twinkle_serve.testing.sdk import sdk_release


@pytest.mark.slow
def test_a_release_shadows_the_installed_one(models_root: Path) -> None:
    folder = sdk_release(models_root, "0.16.1")
    command = [sys.executable, "-c", "import tinker; print(tinker.__version__, tinker.__file__)"]
    environment = os.environ | {"PYTHONPATH": str(folder)}
    said = subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout
    assert said.strip() == f"0.16.1 {folder / 'tinker' / '__init__.py'}"
    assert tinker.__version__ == "0.38.0"
