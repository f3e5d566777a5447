"""Keeps a Serve replica's internal port off the network.

Knows one private detail of Ray Serve 2.60: each replica opens a gRPC port for calls between deployments,
on all addresses, and unpickles what arrives there before anything is checked. Does not know our service.
"""

from __future__ import annotations

import logging
from typing import Any

import ray

_log = logging.getLogger(__name__)
_EVERYWHERE = "[::]"


def bind_to_node_address() -> None:
    """Make this replica open that port on its node's own address: 127.0.0.1 for a private Ray.

    Call it while the replica is constructed; Serve opens the port afterwards.
    """
    from ray.serve._private import replica

    original = getattr(replica, "add_port_to_grpc_server", None)
    if original is None:
        _log.warning("this version of Ray Serve opens its internal ports in an unknown way")
        return
    address = ray.util.get_node_ip_address()

    def add_port(server: Any, where: str) -> Any:
        return original(server, where.replace(_EVERYWHERE, f"[{address}]" if ":" in address else address))

    replica.add_port_to_grpc_server = add_port
