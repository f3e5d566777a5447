"""A server for a test, a demo or a benchmark: started as a user would, on a free port, stopped afterwards.

Knows the command line of ``twinkle-serve up`` and its ``ready`` line. Does not know what is asked of the
server, and ends only the process it started.
"""

from __future__ import annotations

import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

STOP_S = 45.0  # the server promises 30


@dataclass(frozen=True)
class RunningServer:
    """url: what clients pass as base_url. pid: of the foreground process. log: all its output so far."""

    url: str
    pid: int
    log: Path


def free_port() -> int:
    """A TCP port on the loopback address that nobody listens on right now.

    Not of the range from which systems take ports for whoever names none: a server starts seconds later, and
    Ray has taken dozens of those by then.
    """
    while True:
        port = random.randrange(20_000, 32_000)
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


@contextmanager
def running_server(
    config: Path,
    overrides: Sequence[str] = (),
    *,
    log: Path,
    ready_s: float = 180.0,
    program: Sequence[str] = (),
    environment: Mapping[str, str] | None = None,
) -> Iterator[RunningServer]:
    """Run ``twinkle-serve up config --set ...`` until the block ends.

    ``overrides`` are ``dotted.key=value`` strings; a free port is chosen unless they name one. ``program``:
    runs in place of ``twinkle-serve``. ``environment``: more variables for it. Raises RuntimeError with the
    end of the log when the server is not ready in ``ready_s`` seconds or does not stop.
    """
    settings = list(overrides)
    if not any(setting.startswith("http.port=") for setting in settings):
        settings.append(f"http.port={free_port()}")
    command = [*(program or [str(Path(sys.executable).parent / "twinkle-serve")]), "up", str(config)]
    for setting in settings:
        command += ["--set", setting]
    # Other jobs may share this machine's memory; Ray must not take their use for ours and kill workers.
    variables = os.environ | {"RAY_memory_monitor_refresh_ms": "0", "PYTHONUNBUFFERED": "1"}
    variables |= environment or {}
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=variables)
    try:
        yield RunningServer(_wait_until_ready(process, log, ready_s), process.pid, log)
    finally:
        _stop(process, log)


def _wait_until_ready(process: subprocess.Popen[bytes], log: Path, ready_s: float) -> str:
    deadline = time.monotonic() + ready_s
    while time.monotonic() < deadline:
        for line in log.read_text(errors="replace").splitlines():
            if line.startswith("ready http"):
                return line.split()[1]
        if process.poll() is not None:
            raise RuntimeError(f"the server exited with {process.returncode}:\n{_tail(log)}")
        time.sleep(0.2)
    raise RuntimeError(f"the server was not ready after {ready_s:.0f} s:\n{_tail(log)}")


def _stop(process: subprocess.Popen[bytes], log: Path) -> None:
    if process.poll() is not None:
        return
    process.send_signal(signal.SIGTERM)
    try:
        process.wait(STOP_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        raise RuntimeError(f"the server ignored SIGTERM for {STOP_S:.0f} s:\n{_tail(log)}") from None


def _tail(log: Path) -> str:
    return "\n".join(log.read_text(errors="replace").splitlines()[-40:])
