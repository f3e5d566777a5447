"""What may import what: the parts that need neither torch nor ray load without them, all their modules."""

from __future__ import annotations

import subprocess
import sys

import pytest

PROGRAM = """
import importlib, pkgutil, sys
package = importlib.import_module(sys.argv[1])
names = [module.name for module in pkgutil.walk_packages(package.__path__, f"{sys.argv[1]}.")]
assert names
for name in names:
    importlib.import_module(name)
    heavy = {"torch", "ray"} & set(sys.modules)
    assert not heavy, f"{name} imports {heavy}"
"""


@pytest.mark.parametrize("package", ["control", "protocol", "gateway", "plan", "console", "storage", "hub"])
def test_neither_torch_nor_ray_is_imported(package: str) -> None:
    command = [sys.executable, "-c", PROGRAM, f"twinkle_serve.{package}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
