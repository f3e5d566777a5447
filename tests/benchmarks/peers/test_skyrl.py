from __future__ import annotations

import os
import subprocess

from benchmarks.peers import skyrl


def test_the_engine_is_started_in_the_environment_that_is_there(tmp_path):
    python = tmp_path / "python of peer"
    python.write_text('#!/bin/sh\nprintf "%s|" "$@"\n')
    python.chmod(0o755)
    variables = os.environ | skyrl._variables(python, tmp_path)
    command = ["uv", "run", "--extra", "tinker", "-m", "tx.tinker.engine", "--backend-config", '{"a": 1}']
    found = subprocess.run(command, env=variables, capture_output=True, text=True, check=True)
    assert found.stdout == '-m|tx.tinker.engine|--backend-config|{"a": 1}|'
