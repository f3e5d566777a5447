"""Two nodes on this machine: ``serve deploy`` and ``serve status``, ranks on both, a rolling update under
load, and the loss of a node. Part of ``make test-faults``: it takes minutes."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faults.cluster import Cluster, deployment, two_nodes
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
