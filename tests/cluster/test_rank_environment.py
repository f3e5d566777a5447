from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest
import ray

from twinkle_serve.cluster.rank_environment import free_address, prepare_environment
from twinkle_serve.config import ModelConfig

CPU = ModelConfig(name="tiny", path="nowhere", device="cpu", num_threads=3)


@pytest.fixture(autouse=True)
def _loopback_and_a_clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray.util, "get_node_ip_address", lambda: "127.0.0.1")
    monkeypatch.setattr(os, "environ", {})


def test_threads_and_accelerator_are_settled_before_torch_is_there() -> None:
    prepare_environment(CPU)
    assert os.environ["OMP_NUM_THREADS"] == "3"
    assert os.environ["OMP_WAIT_POLICY"] == "PASSIVE"
    assert os.environ["DS_ACCELERATOR"] == "cpu"


def test_ranks_of_a_node_share_its_cores_unless_told_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    prepare_environment(CPU.model_copy(update={"num_threads": None, "ranks": 4, "device": "cuda"}))
    assert os.environ["OMP_NUM_THREADS"] == "2"
    assert "DS_ACCELERATOR" not in os.environ


def test_collectives_use_the_interface_that_has_the_nodes_address() -> None:
    prepare_environment(CPU)
    assert os.environ["GLOO_SOCKET_IFNAME"] == os.environ["NCCL_SOCKET_IFNAME"]
    kind = Path("/sys/class/net") / os.environ["GLOO_SOCKET_IFNAME"] / "type"
    assert kind.read_text().strip() == "772"  # the loopback device


def test_an_interface_that_the_operator_chose_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "ib0"
    prepare_environment(CPU)
    assert os.environ["GLOO_SOCKET_IFNAME"] == "ib0"


@pytest.mark.parametrize("address", ["::1", "203.0.113.77"])
def test_an_address_without_an_interface_leaves_the_choice_to_gloo(
    monkeypatch: pytest.MonkeyPatch, address: str
) -> None:
    monkeypatch.setattr(ray.util, "get_node_ip_address", lambda: address)
    prepare_environment(CPU)
    assert "GLOO_SOCKET_IFNAME" not in os.environ


def test_the_meeting_point_is_free_and_on_this_node() -> None:
    scheme, _, place = free_address().partition("://")
    host, _, port = place.rpartition(":")
    assert (scheme, host) == ("tcp", "127.0.0.1")
    with socket.socket() as probe:
        probe.bind((host, int(port)))
