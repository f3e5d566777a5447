"""A Ray cluster of two nodes on this machine, used as an operator does: ``ray start``, ``serve deploy``.

Each node has a directory, ports and processes of its own, which are ended by pid. Knows Ray's commands. Does
not know what is deployed.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from tests.faults.conftest import RAY_WAS_SLOW
from twinkle_serve.cluster.private_ray import SWITCHES, descendants
from twinkle_serve.testing.server import free_port

BIN = Path(sys.executable).parent
READY_S = 240.0
CROWD = """
import numpy, ray, sys
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

ray.init(address=sys.argv[1], log_to_driver=False)
(head,) = (node["NodeID"] for node in ray.nodes() if "node:__internal_head__" in node["Resources"])

@ray.remote(num_cpus=0, scheduling_strategy=NodeAffinitySchedulingStrategy(head, soft=False))
def fill():
    return len([ray.put(numpy.ones(5 << 20, numpy.uint8)) for _ in range(60)])

ray.get(fill.remote())
"""


@dataclass
class Node:
    """``ray start --block``: all of the node's processes are below it."""

    process: subprocess.Popen[bytes]
    scratch: Path

    def pids(self, title: str) -> list[int]:
        """Of the processes of this node whose title holds this."""
        found = []
        for pid in descendants(self.process.pid):
            with suppress(OSError):
                words = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ")
                if title in words.decode(errors="replace"):
                    found.append(pid)
        return sorted(found)

    def kill(self) -> None:
        """As if the machine lost its power."""
        for pid in [self.process.pid, *descendants(self.process.pid)]:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.wait()
        shutil.rmtree(self.scratch, ignore_errors=True)


@dataclass
class Cluster:
    """quiet: what the clients saw while nothing happened."""

    root: Path
    head_port: int = field(default_factory=free_port)
    dashboard_port: int = field(default_factory=free_port)
    http_port: int = field(default_factory=free_port)
    nodes: list[Node] = field(default_factory=list)
    token: str = field(default_factory=lambda: secrets.token_hex(32))
    quiet: dict[str, Any] = field(default_factory=dict)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.http_port}"

    @property
    def environment(self) -> dict[str, str]:
        address = f"http://127.0.0.1:{self.dashboard_port}"
        own = {"RAY_AUTH_TOKEN": self.token, "RAY_DASHBOARD_ADDRESS": address, "RAY_ADDRESS": address}
        # The one that is left out keeps Ray from having a second node.
        switches = {key: SWITCHES[key] for key in SWITCHES if key != "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"}
        return {**os.environ, **switches, **own, "RAY_memory_monitor_refresh_ms": "0"}

    def add_node(self, num_cpus: int = 2) -> Node:
        """The first one is the head. Ranks are only where there is a CPU."""
        scratch = Path(tempfile.mkdtemp(prefix="tw-", dir="/tmp"))
        options = ["--block", "--node-ip-address=127.0.0.1", f"--temp-dir={scratch}"]
        options += [f"--num-cpus={num_cpus}"]
        options += ["--min-worker-port=0", "--max-worker-port=0", "--object-store-memory=200000000"]
        if self.nodes:
            options += [f"--address=127.0.0.1:{self.head_port}"]
        else:
            options += ["--head", f"--port={self.head_port}", f"--ray-client-server-port={free_port()}"]
            options += ["--dashboard-host=127.0.0.1", f"--dashboard-port={self.dashboard_port}"]
        environment = {name: value for name, value in self.environment.items() if name != "RAY_ADDRESS"}
        path = self.root / f"node{len(self.nodes)}.log"
        command = [str(BIN / "ray"), "start", *options]
        deadline = time.monotonic() + READY_S
        process = None
        while process is None or "will now block" not in path.read_text(errors="replace"):
            if process is None or process.poll() is not None:
                # On a busy machine Ray may be too slow for its own limits; then one starts it once more.
                said = path.read_text(errors="replace") if process is not None else RAY_WAS_SLOW
                assert RAY_WAS_SLOW in said, said
                with path.open("wb") as log:
                    process = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
            assert time.monotonic() < deadline, path.read_text(errors="replace")
            time.sleep(0.2)
        self.nodes.append(Node(process, scratch))
        return self.nodes[-1]

    def crowd_the_head(self) -> None:
        """Put more into its object store than that holds: what nobody needs to be there is gone then."""
        command = [sys.executable, "-c", CROWD, f"127.0.0.1:{self.head_port}"]
        subprocess.run(command, env=self.environment, check=True, timeout=READY_S)

    def deploy(self, tree: dict[str, Any]) -> None:
        """``serve deploy``, again and again until the head answers."""
        path = self.root / "deployment.yaml"
        path.write_text(yaml.safe_dump(tree))
        deadline = time.monotonic() + READY_S
        while (done := self._serve("deploy", str(path))).returncode != 0:
            assert time.monotonic() < deadline, done.stderr
            time.sleep(1)

    def status(self) -> dict[str, Any]:
        """``serve status``; nothing while Serve starts."""
        done = self._serve("status")
        status: dict[str, Any] = (yaml.safe_load(done.stdout) or {}) if done.returncode == 0 else {}
        return status

    def await_running(self) -> dict[str, Any]:
        deadline = time.monotonic() + READY_S
        while True:
            application = self.status().get("applications", {}).get("twinkle", {})
            if application.get("status") == "RUNNING":
                return dict(application)
            assert application.get("status") != "DEPLOY_FAILED", application
            assert time.monotonic() < deadline, (application, self.logs())
            time.sleep(1)

    def logs(self) -> str:
        return "\n".join(path.read_text(errors="replace")[-2000:] for path in self.root.glob("*.log"))

    def _serve(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        command = [str(BIN / "serve"), *arguments]
        return subprocess.run(
            command, env=self.environment, capture_output=True, text=True, timeout=120, check=False
        )


@contextmanager
def two_nodes(root: Path, head_cpus: int = 2) -> Iterator[Cluster]:
    cluster = Cluster(root)
    try:
        cluster.add_node(head_cpus)
        cluster.add_node()
        yield cluster
    finally:
        for node in reversed(cluster.nodes):
            if node.process.poll() is None:
                node.kill()


def deployment(cluster: Cluster, model: Path, store: Path, **model_settings: Any) -> dict[str, Any]:
    """One tiny model; two ingress replicas."""
    tiny = {"name": "tiny", "path": str(model), "device": "cpu", "num_threads": 1, "deterministic": True}
    config = {
        "models": [tiny | model_settings],
        "http": {"replicas": 2},
        "storage": {"root": str(store), "snapshot_every_steps": 4},
    }
    return {
        "proxy_location": "HeadOnly",
        "http_options": {"host": "127.0.0.1", "port": cluster.http_port},
        "applications": [
            {
                "name": "twinkle",
                "route_prefix": "/",
                "import_path": "twinkle_serve.app:build_app",
                "args": json.loads(json.dumps(config)),
            }
        ],
    }
