"""What a rank's process needs in place before torch is imported: threads, network interface, DeepSpeed.

Knows environment variables and this node's addresses. Does not know torch, nor what runs on it.
"""

from __future__ import annotations

import fcntl
import os
import socket
import struct

import ray

from twinkle_serve.config import ModelConfig

_SIOCGIFADDR = 0x8915


def prepare_environment(config: ModelConfig) -> None:
    """Call it before torch is imported in this process."""
    threads = config.num_threads or max(1, (os.cpu_count() or 1) // config.ranks)
    os.environ["OMP_NUM_THREADS"] = str(threads)
    # Threads that spin while they wait make a step ten times slower as soon as others want the cores.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    if config.device == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"
    # A rank that is killed must not make its peers wait out NCCL's own ten minutes: the group does the
    # watching, and what is left of a communicator ends with its process.
    os.environ.setdefault("TORCH_NCCL_ASYNC_ERROR_HANDLING", "1")
    os.environ.setdefault("TORCH_NCCL_DUMP_ON_TIMEOUT", "0")
    interface = _interface_of(ray.util.get_node_ip_address())
    if interface is not None:
        # Otherwise gloo asks what the host's name resolves to, which need not be where the other ranks are.
        os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
        os.environ.setdefault("NCCL_SOCKET_IFNAME", interface)


def free_address() -> str:
    """``tcp://host:port`` on this node that nobody listens on right now."""
    host = ray.util.get_node_ip_address()
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.bind((host, 0))
        port = probe.getsockname()[1]
    return f"tcp://[{host}]:{port}" if family == socket.AF_INET6 else f"tcp://{host}:{port}"


def _interface_of(address: str) -> str | None:
    """The network interface with this IPv4 address, or None (IPv6, or an address that is not on one)."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            request = struct.pack("256s", name.encode())
            try:
                answer = fcntl.ioctl(probe.fileno(), _SIOCGIFADDR, request)
            except OSError:
                continue  # it has no IPv4 address
            if socket.inet_ntoa(answer[20:24]) == address:
                return name
    return None
