"""Two nodes on this machine: ``serve deploy`` and ``serve status``, ranks on both, a rolling update under
load, and the loss of a node and of what lay on it. Part of ``make test-faults``: it takes minutes."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.faults.cluster import READY_S, Cluster, deployment, two_nodes
from tests.faults.loops import loops

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1200),
    pytest.mark.skipif("TWINKLE_FAULT_SEEDS" not in os.environ, reason="make test-faults"),
]
PROGRAMS = ["sft", "rl"]
TWO_RANKS = {"ranks": 2, "sharding": "expert_parallel", "placement": "spread", "stall_deadline_s": 20.0}


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with two_nodes(tmp_path_factory.mktemp("cluster")) as cluster:
        yield cluster


def _ranks(cluster: Cluster) -> list[list[int]]:
    """The pids of the rank workers on each node."""
    return [[*node.pids("ray::rank "), *node.pids("ray::RankWorker")] for node in cluster.nodes]


def test_ranks_of_one_group_are_on_both_nodes_and_train(
    cluster: Cluster, tiny_moe: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    cluster.deploy(deployment(cluster, tiny_moe, cluster.root / "store", **TWO_RANKS))
    application = cluster.await_running()
    assert application["deployments"]["ingress"]["status"] == "HEALTHY"
    logs = tmp_path_factory.mktemp("quiet")
    with loops(cluster.url, logs, PROGRAMS) as clients:
        clients.wait_for(1)
        assert [len(pids) for pids in _ranks(cluster)] == [1, 1]
        cluster.quiet = clients.seen(cluster.root / "store")


def test_a_rolling_update_under_load_loses_nothing_and_leaves_the_model_loaded(
    cluster: Cluster, tiny_moe: Path, tmp_path: Path
) -> None:
    before = _ranks(cluster)
    with loops(cluster.url, tmp_path, PROGRAMS) as clients:
        clients.wait_for(3)
        tree = deployment(cluster, tiny_moe, cluster.root / "store", **TWO_RANKS)
        tree["applications"][0]["args"]["http"] = {"replicas": 3, "poll_hold_s": 20}
        cluster.deploy(tree)
        cluster.await_running()
        assert clients.seen(cluster.root / "store") == cluster.quiet
    assert _ranks(cluster) == before
    deadline = time.monotonic() + 60
    while cluster.status()["applications"]["twinkle"]["deployments"]["ingress"]["replica_states"] != {
        "RUNNING": 3
    }:
        assert time.monotonic() < deadline, cluster.status()
        time.sleep(1)


def test_a_run_survives_the_loss_of_the_other_node(cluster: Cluster, tmp_path: Path) -> None:
    with loops(cluster.url, tmp_path, PROGRAMS) as clients:
        clients.wait_for(3)
        head, worker = cluster.nodes
        worker.kill()
        assert clients.seen(cluster.root / "store") == cluster.quiet
    here = [*head.pids("ray::rank "), *head.pids("ray::RankWorker")]
    assert len(here) == 2


def test_a_large_result_that_nobody_fetched_outlives_the_node_it_was_computed_on(
    tiny_moe: Path, tmp_path: Path
) -> None:
    with two_nodes(tmp_path, head_cpus=0) as cluster:
        cluster.deploy(deployment(cluster, tiny_moe, tmp_path / "store"))
        cluster.await_running()
        _bring_the_coordinator_to_the_head(cluster)
        with httpx.Client(base_url=cluster.url, headers={"X-API-Key": "tml-x"}, timeout=90) as http:
            run_id = _result(http, _create_model(http))["model_id"]
            texts = [[5 + (7 * shift + n) % 300 for n in range(1000)] for shift in range(40)]
            passes = _post(http, "forward_backward", _pass(run_id, texts))
            step = {"model_id": run_id, "seq_id": 2, "adam_params": {"learning_rate": 1e-3}}
            _result(http, _post(http, "optim_step", step))
            assert [len(pids) for pids in _ranks(cluster)] == [0, 1]
            cluster.crowd_the_head()
            cluster.add_node()
            cluster.nodes[1].kill()
            outputs = _result(http, passes)["loss_fn_outputs"]
            assert [len(each["logprobs"]["data"]) for each in outputs] == [999] * 40


def _bring_the_coordinator_to_the_head(cluster: Cluster) -> None:
    """Ray starts it anywhere, and anywhere again when it dies."""
    deadline = time.monotonic() + READY_S
    while not cluster.nodes[0].pids("ray::Coordinator"):
        assert time.monotonic() < deadline, cluster.logs()
        for pid in cluster.nodes[1].pids("ray::Coordinator"):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.5)


def _post(http: httpx.Client, path: str, body: dict[str, Any]) -> str:
    while (answer := http.post(f"/api/v1/{path}", json=body)).status_code == 503:
        time.sleep(0.5)  # the coordinator still starts
    assert answer.status_code == 200, answer.text
    return str(answer.json()["request_id"])


def _create_model(http: httpx.Client) -> str:
    session = {"tags": [], "user_metadata": {}}
    while (answer := http.post("/api/v1/create_session", json=session)).status_code == 503:
        time.sleep(0.5)
    body = {"session_id": answer.json()["session_id"], "model_seq_id": 0, "base_model": "tiny"}
    return _post(http, "create_model", body | {"lora_config": {"rank": 4, "seed": 5}})


def _pass(run_id: str, texts: list[list[int]]) -> dict[str, Any]:
    data = [
        {
            "model_input": {"chunks": [{"type": "encoded_text", "tokens": text[:-1]}]},
            "loss_fn_inputs": {"target_tokens": {"data": text[1:], "dtype": "int64", "shape": [999]}},
        }
        for text in texts
    ]
    loss = {"data": data, "loss_fn": "cross_entropy"}
    return {"model_id": run_id, "seq_id": 1, "forward_backward_input": loss}


def _result(http: httpx.Client, request_id: str) -> dict[str, Any]:
    """The first answer that is not "ask again"."""
    body = {"request_id": request_id}
    deadline = time.monotonic() + READY_S
    while (answer := http.post("/api/v1/retrieve_future", json=body)).status_code == 408:
        assert time.monotonic() < deadline, answer.text
    assert answer.status_code == 200, answer.text
    value: dict[str, Any] = answer.json()
    return value
