"""Servers that can be killed to the last process and started again on the same storage."""

from __future__ import annotations

import functools
import os
import random
import signal
import socket
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tests.faults.loops import STEPS, loops
from twinkle_serve.cluster.private_ray import descendants
from twinkle_serve.testing.server import free_port

FILES = Path(__file__).parents[2] / "deployments"
DEPLOYMENTS = ["local", "local-2rank"]
READY_S = 240.0
TRAP_S = 120.0
STOP_S = 120.0  # how soon it must be over is test_stop.py's
RAY_WAS_SLOW = "The current node timed out during startup"
TITLES = {
    "ingress": ["ServeReplica:", "ingress"],
    "coordinator": ["Coordinator"],
    "rank": ["rank ", "RankWorker"],
}


@dataclass
class Server:
    """``twinkle-serve up`` of a deployment file on one port and one storage root, through all its deaths.

    earlier_runs: those that clients have left behind which are gone.
    """

    root: Path
    model: Path
    deployment: Path
    port: int = field(default_factory=free_port)
    earlier_runs: set[str] = field(default_factory=set)
    process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def log(self) -> Path:
        return self.root / "server.log"

    @property
    def store(self) -> Path:
        return self.root / "store"

    @property
    def traps(self) -> Path:
        return self.root / "traps"

    def start(self) -> None:
        command = [str(Path(sys.executable).parent / "twinkle-serve"), "up", str(self.deployment)]
        for setting in self._settings():
            command += ["--set", setting]
        self.traps.mkdir(exist_ok=True)
        environment = os.environ | {
            "RAY_memory_monitor_refresh_ms": "0",
            "PYTHONUNBUFFERED": "1",
            "TWINKLE_FAULTS": str(self.traps),
        }
        deadline = time.monotonic() + READY_S
        self.process, before = None, self._count("ready http")
        while self._count("ready http") == before:
            if self.process is None or self.process.poll() is not None:
                # On a busy machine Ray may be too slow for its own limits; then one starts it once more.
                assert self.process is None or RAY_WAS_SLOW in self.tail(), self.tail()
                with self.log.open("ab") as output:
                    self.process = subprocess.Popen(command, stdout=output, stderr=output, env=environment)
            assert time.monotonic() < deadline, self.tail()
            time.sleep(0.1)

    def _count(self, text: str) -> int:
        return self.log.read_text(errors="replace").count(text) if self.log.exists() else 0

    def _settings(self) -> list[str]:
        return [
            "models.0.name=tiny",
            f"models.0.path={self.model}",
            "models.0.device=cpu",
            "models.0.num_threads=1",
            "models.0.deterministic=true",
            f"storage.root={self.store}",
            "storage.snapshot_every_steps=4",
            f"http.port={self.port}",
        ]

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

    def kill(self, victim: str, rng: random.Random) -> None:
        """SIGKILL an ``ingress`` replica, the ``coordinator``, a ``rank``, or ``everything``."""
        assert self.process is not None
        if victim == "everything":
            pids = [self.process.pid, *descendants(self.process.pid)]
        else:
            pids = [rng.choice(self._await(victim))]
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        if victim == "everything":
            self.process.wait()
            deadline = time.monotonic() + 30
            while not _is_free(self.port) and time.monotonic() < deadline:
                time.sleep(0.02)  # a killed process holds its sockets until its last thread is gone

    def _await(self, victim: str) -> list[int]:
        """Those there are. One that is dead already is replaced soon."""
        deadline = time.monotonic() + TRAP_S
        while not (found := self.pids(*TITLES[victim])):
            assert time.monotonic() < deadline, f"there is no {victim} to be killed:\n{self.tail()}"
            time.sleep(0.05)
        return found

    def strike(self, victim: str, place: str | None, rng: random.Random) -> None:
        """Kill the victim while a process stands at ``place`` (None: anywhere), and let life go on."""
        if place is None:
            time.sleep(rng.uniform(0, 0.3))
        else:
            if place == "in replay":
                self._await_a_snapshot()
            (self.traps / place).touch()
            if place == "in replay":
                self.kill("rank", rng)
            self._await_somebody_at(place)
        self._finish(victim, rng)

    def kill_at(self, victim: str, place: str, rng: random.Random) -> None:
        """The same where somebody has laid the trap already."""
        self._await_somebody_at(place)
        self._finish(victim, rng)

    def _finish(self, victim: str, rng: random.Random) -> None:
        self.kill(victim, rng)
        for path in self.traps.iterdir():
            path.unlink()
        if victim == "everything":
            self.start()

    def runs_in(self, *tables: str) -> set[str]:
        """The runs that have rows in these tables of the journal."""
        query = " UNION ".join(f"SELECT run_id FROM journal_{table}" for table in tables)
        with closing(sqlite3.connect(f"file:{self.store}/journal.sqlite?mode=ro", uri=True)) as journal:
            return {run_id for (run_id,) in journal.execute(query)}

    def _await_a_snapshot(self) -> None:
        """Of a run of now. One that has none is not restored but made again."""
        deadline = time.monotonic() + TRAP_S
        while not self.runs_in("snapshots") - self.earlier_runs:
            assert time.monotonic() < deadline, f"no run is snapshotted:\n{self.tail()}"
            time.sleep(0.05)

    def _await_somebody_at(self, place: str) -> None:
        deadline = time.monotonic() + TRAP_S
        while (self.traps / place).exists():
            assert time.monotonic() < deadline, f"nobody came by {place!r}:\n{self.tail()}"
            time.sleep(0.005)

    def stop(self) -> None:
        if self.process is None or self.process.poll() is not None:
            return
        self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            self.kill("everything", random.Random())
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


@contextmanager
def running(server: Server) -> Iterator[Server]:
    """Started, and ended whatever has become of it."""
    try:
        server.start()
        yield server
    finally:
        try:
            server.stop()
        finally:
            if server.process is not None and server.process.poll() is None:
                server.kill("everything", random.Random())


class Standing:
    """A server that stays up from test to test, as long as they ask for its deployment and none fails."""

    def __init__(self, new: Callable[[str], Server]) -> None:
        self._new = new
        self._server: Server | None = None
        self._name = ""
        self._running = ExitStack()

    @contextmanager
    def borrowed(self, name: str) -> Iterator[Server]:
        """The deployment's server, with whatever earlier tests have left in it."""
        if self._server is None or self._name != name:
            self.end()
            self._name, self._server = name, self._running.enter_context(running(self._new(name)))
        self._server.earlier_runs = self._server.runs_in("entries", "snapshots")
        try:
            yield self._server
        except BaseException:
            self.end()  # nobody knows what has become of it
            raise

    def end(self) -> None:
        self._server = None
        self._running.close()


@pytest.fixture(scope="session")
def new_server(tiny_llama: Path, tiny_moe: Path) -> Callable[[str, Path], Server]:
    """A server of a deployment file on an empty directory, not started yet."""
    models = {"local": tiny_llama, "local-2rank": tiny_moe}

    def new(name: str, root: Path) -> Server:
        return Server(root, models[name], FILES / f"{name}.yaml")

    return new


@pytest.fixture(scope="package")
def standing(
    tmp_path_factory: pytest.TempPathFactory, new_server: Callable[[str, Path], Server]
) -> Iterator[Standing]:
    servers = Standing(lambda name: new_server(name, tmp_path_factory.mktemp(name)))
    yield servers
    servers.end()


@pytest.fixture(scope="package")
def quiet(tmp_path_factory: pytest.TempPathFactory, standing: Standing) -> Callable[[str], dict[str, Any]]:
    """What the programs of sdk_loop.py see on a deployment when nothing happens."""

    @functools.cache
    def run(name: str) -> dict[str, Any]:
        root = tmp_path_factory.mktemp("quiet")
        with standing.borrowed(name) as server, loops(server.url, root, STEPS) as clients:
            return clients.seen(server.store)

    return run
