"""The SDK programs of sdk_loop.py, each in a process of its own, and what has become of their runs."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

PROGRAM = Path(__file__).parent / "sdk_loop.py"
STEPS = {"sft": 20, "rl": 14}


class Loop:
    """One client process; ``wait_for(step)`` follows its progress."""

    def __init__(self, url: str, program: str, errors: Path) -> None:
        self._errors = errors
        command = [sys.executable, str(PROGRAM), url, "tiny", program, str(STEPS[program])]
        environment = os.environ | {"TINKER_TELEMETRY": "0"}
        with errors.open("wb") as output:
            self.process = subprocess.Popen(
                command, stdout=subprocess.PIPE, stderr=output, env=environment, text=True
            )
        self._lines: list[str] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self._lines.append(line)

    def wait_for(self, step: int, timeout_s: float = 240.0) -> None:
        deadline = time.monotonic() + timeout_s
        while f"step {step}\n" not in self._lines and self.process.poll() is None:
            assert time.monotonic() < deadline, self.problem()
            time.sleep(0.01)

    def result(self, timeout_s: float = 240.0) -> dict[str, Any]:
        try:
            code = self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"the client hangs: {self.problem()}") from None
        self._reader.join(10)
        assert code == 0, f"exit code {code}: {self.problem()}"
        seen: dict[str, Any] = json.loads(self._lines[-1])
        return seen

    def end(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        self._reader.join(10)
        assert self.process.stdout is not None
        self.process.stdout.close()

    def problem(self) -> str:
        return f"{self._lines[-3:]}\n{self._errors.read_text(errors='replace')[-3000:]}"


class Loops:
    """Programs at once: tenants of one server that know nothing of each other."""

    def __init__(self, url: str, logs: Path, programs: Sequence[str]) -> None:
        self.each = {program: Loop(url, program, logs / f"{program}.log") for program in programs}

    @property
    def num_steps(self) -> int:
        return STEPS[next(iter(self.each))]

    def wait_for(self, step: int) -> None:
        """Of the first program."""
        next(iter(self.each.values())).wait_for(step)

    def seen(self, store: Path) -> dict[str, Any]:
        """What each saw, and the sha256 of the adapter that it left in ``store``."""
        seen = {program: loop.result() for program, loop in self.each.items()}
        return {program: {**s, "path": weights(store, s["path"])} for program, s in seen.items()}


@contextmanager
def loops(url: str, logs: Path, programs: Sequence[str]) -> Iterator[Loops]:
    started = Loops(url, logs, programs)
    try:
        yield started
    finally:
        for loop in started.each.values():
            loop.end()


def weights(store: Path, path: str) -> str:
    run_id = path.removeprefix("tinker://").removesuffix("/weights/final")
    manifests = (store / "checkpoints").glob("*/weights/final/manifest.json")
    (found,) = (each for each in manifests if json.loads(each.read_bytes())["run_id"] == run_id)
    return hashlib.sha256((found.parent / "adapter_model.safetensors").read_bytes()).hexdigest()
