"""A server behind HAProxy: the whole SDK program, no port but its own, and a replica's death goes unnoticed.

``TWINKLE_PROXY=haproxy`` runs every other test of this directory behind it.
"""

from __future__ import annotations

import json
import os
import signal
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import tinker
from tinker import types

from tests.e2e.sdk_program import datum
from twinkle_serve.cluster.private_ray import descendants
from twinkle_serve.testing.server import RunningServer, running_server

pytestmark = pytest.mark.slow
LOOPBACK = "0100007F"


@pytest.fixture(scope="module")
def behind_haproxy(tiny_moe: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    directory = tmp_path_factory.mktemp("behind haproxy")
    config = directory / "config.yaml"
    model = {"name": "moe", "path": str(tiny_moe), "num_threads": 1, "device": "cpu"}
    tree = {"models": [model], "storage": {"root": str(directory / "store")}, "http": {"proxy": "haproxy"}}
    config.write_text(json.dumps(tree))
    with running_server(config, log=directory / "server.log") as server:
        yield server


def named(server: RunningServer, what: str) -> list[int]:
    """The server's processes with this in their title."""
    found = []
    for pid in descendants(server.pid):
        title = Path(f"/proc/{pid}/cmdline")
        if title.exists() and what in title.read_text().replace("\0", " "):
            found.append(pid)
    return found


def test_the_sdk_program(
    behind_haproxy: RunningServer, run_sdk_program: Callable[..., dict[str, Any]]
) -> None:
    seen = run_sdk_program(behind_haproxy.url, "moe")
    assert seen["losses"][-1] < 0.7 * seen["losses"][0]


def test_haproxy_answers_and_only_on_the_loopback_address(behind_haproxy: RunningServer) -> None:
    (pid,) = named(behind_haproxy, "bin/haproxy")
    own = {os.readlink(f) for f in Path(f"/proc/{pid}/fd").iterdir() if f.is_symlink()}
    listening = {}
    for line in Path("/proc/net/tcp").read_text().splitlines()[1:]:
        address, state, inode = (line.split()[column] for column in (1, 3, 9))
        if state == "0A" and f"socket:[{inode}]" in own:
            host, port = address.split(":")
            listening[int(port, 16)] = host
    assert listening == {int(behind_haproxy.url.rpartition(":")[2]): LOOPBACK}


def test_what_is_no_route_is_our_404(behind_haproxy: RunningServer) -> None:
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(f"{behind_haproxy.url}/api/v1/nothing", timeout=60)
    assert refused.value.code == 404
    assert "detail" in json.load(refused.value)


def test_the_death_of_each_replica_goes_unnoticed(behind_haproxy: RunningServer) -> None:
    service = tinker.ServiceClient(base_url=behind_haproxy.url, api_key="tml-haproxy")
    client = service.create_lora_training_client(base_model="moe", rank=4).result()
    losses = []
    for doomed in named(behind_haproxy, "ServeReplica"):
        future = client.forward_backward([datum(list(range(5, 21)))], "cross_entropy")
        os.kill(doomed, signal.SIGKILL)
        client.optim_step(types.AdamParams(learning_rate=1e-2)).result(timeout=120)
        losses.append(future.result(timeout=120).metrics["loss:sum"])
    assert len(losses) == 2
    assert losses[1] < losses[0]
