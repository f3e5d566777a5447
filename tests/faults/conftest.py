"""Servers that can be killed to the last process and started again on the same storage."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from twinkle_serve.cluster.private_ray import descendants
from twinkle_serve.testing.server import free_port

LOOP = Path(__file__).parent / "sdk_loop.py"
READY_S = 240.0


@dataclass
class Server:
    """``twinkle-serve up`` on one port and one storage root, through all its deaths."""

    root: Path
    model: Path
    port: int = field(default_factory=free_port)
    process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def log(self) -> Path:
        return self.root / "server.log"

    def start(self) -> None:
        config = self.root / "config.json"
        model = {"name": "tiny", "path": str(self.model), "num_threads": 1, "device": "cpu"}
        tree = {
            "models": [model | {"deterministic": True}],
            "storage": {"root": str(self.root / "store"), "snapshot_every_steps": 4},
            "http": {"port": self.port, "replicas": 2},
        }
        config.write_text(json.dumps(tree))
        command = [str(Path(sys.executable).parent / "twinkle-serve"), "up", str(config)]
        environment = os.environ | {"RAY_memory_monitor_refresh_ms": "0", "PYTHONUNBUFFERED": "1"}
        before = self.log.read_text(errors="replace").count("ready http") if self.log.exists() else 0
        with self.log.open("ab") as output:
            self.process = subprocess.Popen(command, stdout=output, stderr=output, env=environment)
        deadline = time.monotonic() + READY_S
        while self.log.read_text(errors="replace").count("ready http") == before:
            assert self.process.poll() is None, self.tail()
            assert time.monotonic() < deadline, self.tail()
            time.sleep(0.1)

    def pids(self, *titles: str) -> list[int]:
        """Processes of this server whose title holds one of these."""
        assert self.process is not None
        found = []
        for pid in descendants(self.process.pid):
            try:
                title = (
                    Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                )
            except OSError:
                continue
            if any(each in title for each in titles):
                found.append(pid)
        return sorted(found)

    def kill(self, what: str) -> None:
        """SIGKILL ``ingress``, ``coordinator``, ``rank`` (one process each), or ``everything``."""
        assert self.process is not None
        if what == "everything":
            pids = [self.process.pid, *descendants(self.process.pid)]
        else:
            titles = {
                "ingress": ["ingress"],
                "coordinator": ["Coordinator"],
                "rank": ["rank 0", "RankWorker"],
            }
            pids = self.pids(*titles[what])[:1]
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        if what == "everything":
            self.process.wait()
            deadline = time.monotonic() + 30
            while not _is_free(self.port) and time.monotonic() < deadline:
                time.sleep(0.02)  # a killed process holds its sockets until its last thread is gone

    def stop(self) -> None:
        if self.process is None or self.process.poll() is not None:
            return
        self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(45)
        except subprocess.TimeoutExpired:
            self.kill("everything")
            raise AssertionError(f"SIGTERM was ignored:\n{self.tail()}") from None

    def tail(self) -> str:
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-40:])


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


class Loop:
    """The SDK program in its own process; ``wait_for(step)`` follows its progress."""

    def __init__(self, url: str, steps: int, errors: Path) -> None:
        self._errors = errors
        command = [sys.executable, str(LOOP), url, "tiny", str(steps)]
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

    def wait_for(self, step: int, timeout_s: float = 120.0) -> None:
        deadline = time.monotonic() + timeout_s
        while f"step {step}\n" not in self._lines and self.process.poll() is None:
            assert time.monotonic() < deadline, self._problem()
            time.sleep(0.01)

    def result(self, timeout_s: float = 240.0) -> dict[str, Any]:
        try:
            code = self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise AssertionError(f"the client hangs: {self._problem()}") from None
        self._reader.join(10)
        assert self.process.stdout is not None
        self.process.stdout.close()
        assert code == 0, self._problem()
        seen: dict[str, Any] = json.loads(self._lines[-1])
        return seen

    def _problem(self) -> str:
        return f"{self._lines[-3:]}\n{self._errors.read_text(errors='replace')[-3000:]}"


@pytest.fixture
def server_on(tiny_llama: Path) -> Callable[[Path], Any]:
    """``with server_on(root) as server``: started, and ended whatever has become of it."""

    @contextmanager
    def run(root: Path) -> Iterator[Server]:
        server = Server(root, tiny_llama)
        server.start()
        try:
            yield server
        finally:
            try:
                server.stop()
            finally:
                if server.process is not None and server.process.poll() is None:
                    server.kill("everything")

    return run
