"""Servers that know their callers: the user's command line, the cookbook's tools, and where a key is found
after all that work: nowhere."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.e2e.canary_program import PROMPT
from tests.hub.site import MARKER, Site, running_site
from twinkle_serve.cluster.private_ray import descendants
from twinkle_serve.storage.keys import KeyStore
from twinkle_serve.testing.server import RunningServer, running_server

pytestmark = pytest.mark.slow

CANARY, STRANGER = "ms-canary-4b1d97a2c5", "ms-stranger-77e0"
# Where a key has to be for a moment, because requests bring it there.
AT_THE_DOOR = ("ProxyActor", "ServeReplica")


@dataclass
class Service:
    server: RunningServer
    directory: Path
    key: str
    secret: str
    base: Path
    site: Site | None = None
    seen: dict[str, Any] = field(default_factory=dict)

    def environment(self, key: str) -> dict[str, str]:
        own = {"TINKER_BASE_URL": self.server.url, "TINKER_API_KEY": key, "TINKER_TELEMETRY": "0"}
        return os.environ | own | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}

    def tinker(self, *arguments: str, key: str = "", fails: bool = False) -> str:
        """The SDK's command line as a process; what it printed, or with ``fails`` its complaint."""
        command = [str(Path(sys.executable).parent / "tinker"), *arguments]
        environment = self.environment(key or self.key)
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if done.returncode == -signal.SIGABRT:
            # Seen once in hundreds of calls on a busy machine: the SDK's process aborts as it exits, with no
            # word, because a thread of it outlives the interpreter. What it was asked for was done.
            done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert (done.returncode != 0) is fails, done.stdout + done.stderr
        return done.stdout + done.stderr if fails else done.stdout

    def json(self, *arguments: str) -> Any:
        return json.loads(self.tinker("-f", "json", *arguments))

    def program(self, *arguments: str) -> dict[str, Any]:
        command = [
            sys.executable,
            "-W",
            "ignore",
            "-m",
            "tests.e2e.canary_program",
            self.server.url,
            *arguments,
        ]
        done = subprocess.run(
            command, env=self.environment(self.key), capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr[-4000:]
        found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        return found

    def places_with(self, secret: str) -> list[str]:
        """Every file and every process of the server, but those at the door, that has the secret in it."""
        needle = secret.encode()
        files = [path for path in self.directory.rglob("*") if path.is_file()]
        scratch = scratch_of(self.server.pid)
        assert (scratch / "session_latest").exists(), "Ray's logs are elsewhere and would not be searched"
        files += [path for path in scratch.rglob("*") if path.is_file()]
        found = [str(path) for path in files if needle in path.read_bytes()]
        return found + [
            line for pid in (self.server.pid, *descendants(self.server.pid)) for line in inside(pid, needle)
        ]


def scratch_of(pid: int) -> Path:
    """The temporary directory of a server's Ray: logs, sockets, sessions."""
    for child in descendants(pid):
        for item in Path(f"/proc/{child}/environ").read_bytes().split(b"\0"):
            if item.startswith(b"TMPDIR=") and b"twinkle-" in item:
                return Path(item.removeprefix(b"TMPDIR=").decode())
    raise AssertionError("no scratch directory")


def inside(pid: int, needle: bytes) -> Iterator[str]:
    """The process, if its memory, command line or environment has ``needle``."""
    try:
        title = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
        if any(name in title for name in AT_THE_DOOR):
            return
        if needle in memory_of(pid) or needle in Path(f"/proc/{pid}/environ").read_bytes():
            yield f"process {title}"
    except (FileNotFoundError, ProcessLookupError):
        return  # it has just ended


def memory_of(pid: int) -> bytes:
    """The writable memory of a process that is not a file's."""
    parts = []
    with open(f"/proc/{pid}/maps") as maps, open(f"/proc/{pid}/mem", "rb", 0) as memory:
        for line in maps:
            span, flags, *_, path = (line.rstrip("\n").split(None, 5) + [""] * 6)[:6]
            if not flags.startswith("rw") or path.startswith(("/", "[v")):
                continue
            start, end = (int(edge, 16) for edge in span.split("-"))
            try:
                memory.seek(start)
                parts.append(memory.read(end - start))
            except (OSError, ValueError, OverflowError):
                continue
    return b"\0".join(parts)


@contextmanager
def serving(directory: Path, model: Path, auth: dict[str, Any]) -> Iterator[RunningServer]:
    tree = {
        "models": [{"name": "base", "path": str(model), "num_threads": 1, "device": "cpu"}],
        "storage": {"root": str(directory / "store")},
        "http": {"replicas": 1},
        "auth": auth,
    }
    config, log = directory / "config.yaml", directory / "server.log"
    config.write_text(json.dumps(tree))
    # With so short a name that all temporary files of a server are in one place, Ray's among them.
    with (
        tempfile.TemporaryDirectory(dir="/tmp", prefix="tw") as short,
        running_server(config, log=log, environment={"TMPDIR": short}) as server,
    ):
        yield server


@pytest.fixture(scope="module")
def hub(tiny_moe: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """A server whose callers have ModelScope tokens, after its user's program has run."""
    directory = tmp_path_factory.mktemp("hub")
    with running_site({CANARY: "alice", STRANGER: "bob"}, members=("alice", "bob")) as site:
        auth = {"mode": "modelscope", "modelscope": {"endpoint": site.url, "marker_repo": MARKER}}
        with serving(directory, tiny_moe, auth) as server:
            service = Service(server, directory, f"tml-{CANARY}", CANARY, tiny_moe, site)
            out = tmp_path_factory.mktemp("out")
            service.seen = service.program("base", str(tiny_moe), str(out)) | {"out": str(out)}
            yield service


def test_the_users_command_line_lists(hub: Service) -> None:
    state, sampler = hub.seen["state"], hub.seen["sampler"]
    run = state.split("/")[2]
    with ThreadPoolExecutor(2) as pool:
        asked = {
            name: pool.submit(hub.json, *name.split())
            for name in (
                "run list",
                f"run info {run}",
                "checkpoint list",
                f"checkpoint list --run-id {run}",
                f"checkpoint info {state}",
                "model list",
            )
        }
    seen = {name: future.result() for name, future in asked.items()}
    assert run in json.dumps(seen["run list"])
    assert run in json.dumps(seen[f"run info {run}"])
    for name in ("checkpoint list", f"checkpoint list --run-id {run}"):
        assert {state, sampler} <= set(_strings(seen[name])), name
    assert state in _strings(seen[f"checkpoint info {state}"])
    assert "base" in _strings(seen["model list"])


def test_the_users_command_line_sets_lifetimes(hub: Service) -> None:
    state = hub.seen["state"]
    hub.tinker("checkpoint", "set-ttl", state, "--ttl", "7200")
    expires = hub.json("checkpoint", "info", state)["expires_at"]
    left = datetime.fromisoformat(expires.replace("Z", "+00:00")) - datetime.now(UTC)
    assert timedelta(minutes=110) < left <= timedelta(hours=2)
    hub.tinker("checkpoint", "set-ttl", state, "--remove")
    assert not hub.json("checkpoint", "info", state).get("expires_at")


def test_the_users_command_line_downloads(hub: Service, tmp_path: Path) -> None:
    state = hub.seen["state"]
    session = state.split("/")[2].split(":")[0]
    hub.tinker("checkpoint", "download", state, "--output", str(tmp_path))
    (adapter,) = tmp_path.iterdir()
    assert {"adapter_config.json", "adapter_model.safetensors"} <= {path.name for path in adapter.iterdir()}
    hub.tinker("session", "export-trace", session, "--output", str(tmp_path / "trace"))
    assert (tmp_path / "trace").stat().st_size > 0
    hour = datetime.now(UTC).replace(minute=0, second=0, microsecond=0)
    window = [hour.isoformat(), (hour + timedelta(hours=2)).isoformat()]
    assert "training" in _strings(hub.json("billing", "usage", *window))


def test_the_users_command_line_deletes_what_is_its_own(hub: Service) -> None:
    sampler = hub.seen["sampler"]
    run = sampler.split("/")[2]
    hub.tinker("run", "info", run, key=f"tml-{STRANGER}", fails=True)
    told = hub.tinker("checkpoint", "delete", sampler, "--yes", key=f"tml-{STRANGER}")
    assert "Deleted 0" in told
    assert "does not exist" in told
    hub.tinker("checkpoint", "delete", sampler, "--yes")
    assert sampler not in _strings(hub.json("checkpoint", "list"))


def test_publishing_reaches_the_owners_repository(hub: Service) -> None:
    assert hub.site is not None
    state = hub.seen["state"]
    hub.tinker("checkpoint", "publish", state)
    (name,) = hub.site.repositories
    assert name.startswith("alice/")
    assert hub.site.visibility[name] == 1
    assert set(hub.site.repositories[name]) == {"adapter_config.json", "adapter_model.safetensors"}
    assert hub.json("checkpoint", "info", state)["public"] is True
    hub.tinker("checkpoint", "unpublish", state)
    assert hub.json("checkpoint", "info", state)["public"] is False


def test_the_cookbooks_tools_work_on_what_it_downloads(hub: Service) -> None:
    out = Path(hub.seen["out"])
    model = AutoModelForCausalLM.from_pretrained(out / "merged", dtype=torch.float32)
    tokens = torch.tensor([PROMPT])
    with torch.no_grad():
        logprobs = model(tokens).logits.log_softmax(-1)[0, :-1].gather(1, tokens[0, 1:, None])[:, 0]
    assert logprobs.tolist() == pytest.approx(hub.seen["logprobs"], abs=2e-3)
    assert (out / "lora" / "adapter_model.safetensors").is_file()


def test_a_modelscope_token_is_nowhere(hub: Service) -> None:
    """Last: after work, failures, downloads and a push."""
    assert not any(CANARY in text for text in hub.seen["failures"])
    assert hub.places_with(CANARY) == []
    assert hub.places_with("created_by"), "what every request brings would be found"


def test_a_key_of_our_own_is_nowhere(tiny_llama: Path, tmp_path: Path) -> None:
    store = KeyStore(tmp_path / "store")
    key = store.create("alice")
    store.close()
    secret = key.removeprefix("tml-")
    with serving(tmp_path, tiny_llama, {"mode": "keys"}) as server:
        service = Service(server, tmp_path, key, secret, tiny_llama)
        seen = service.program("base")
        assert not any(secret in text for text in seen["failures"])
        service.tinker("run", "list", key="tml-nobody", fails=True)
        assert service.places_with(secret) == []
        assert service.places_with(seen["state"].split("/")[2]), "what the server does keep would be found"


def _strings(tree: Any) -> list[str]:
    if isinstance(tree, dict):
        return [text for value in tree.values() for text in _strings(value)]
    if isinstance(tree, list):
        return [text for value in tree for text in _strings(value)]
    return [tree] if isinstance(tree, str) else []
