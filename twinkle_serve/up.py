"""``twinkle-serve up``: the service in the foreground, on a Ray of its own, until a signal comes.

Knows what is started in which order, and that whatever was started ends with it. Does not know arguments or
exit codes (cli.py), nor how the service works. Imports ray only when it starts.
"""

from __future__ import annotations

import fcntl
import os
import signal
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

from twinkle_serve.config import Config

STOP_S = 25.0


class UpError(Exception):
    """The service cannot start; the message is one line for the operator."""


class Stopped(BaseException):
    """SIGTERM or Ctrl-C arrived."""


def serve_until_stopped(config: Config) -> None:
    """Only the ``ready`` line goes to stdout, everything else to stderr. Raises UpError."""
    ready = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    os.environ["HF_HUB_OFFLINE"] = "1"
    stop, with_haproxy = _Stop(), config.http.proxy == "haproxy"
    try:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, stop)
        _require_startable(config)
        # Imported late: `check-config` must not wait for ray, whose switches are read when it is imported.
        from twinkle_serve.cluster.private_ray import private_ray

        _say("starting Ray ...")
        with (
            sole_use(config.storage.root),
            private_ray(config.ray, "twinkle-serve", stop.tell, with_haproxy),
        ):
            try:
                _start(config)
                print(f"ready {url_of(config)}", file=ready, flush=True)
                threading.Event().wait()
            finally:
                _limit_stopping()
                _shut_down()
    except Stopped:
        _say("stopped")


@contextmanager
def sole_use(root: Path) -> Iterator[None]:
    """Two services on one ``root`` would take its journal from each other for ever, and load the model anew
    each time. Raises UpError. Where files cannot be locked, nobody looks."""
    root.mkdir(parents=True, exist_ok=True)
    with (root / "up.lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UpError(f"storage.root {root} is in use by another `twinkle-serve up`") from None
        except OSError:
            pass
        yield


class _Stop:
    """What SIGTERM and Ctrl-C do."""

    def __init__(self) -> None:
        self._is_told = False

    def __call__(self, number: int, _: Any) -> NoReturn:
        for each in (signal.SIGTERM, signal.SIGINT):
            signal.signal(each, signal.SIG_IGN)
        self.tell(number)
        raise Stopped

    def tell(self, number: int) -> None:
        """The time to stop counts from the first signal, also where it cannot be followed yet."""
        if not self._is_told:
            self._is_told = True
            _say(f"stopping on {signal.Signals(number).name} ...")
            _limit_stopping()


def _start(config: Config) -> None:
    import logging

    import ray
    from ray import serve

    from twinkle_serve.app import build_app
    from twinkle_serve.cluster import coordinator
    from twinkle_serve.cluster.deployment import Deployment

    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    # First of all, so that the model loads while Serve starts.
    handle = coordinator.find_or_create(Deployment(config))
    handle.ping.remote()
    serve.start(proxy_location="HeadOnly", http_options={"host": config.http.host, "port": config.http.port})
    serve.run(build_app(config), name="twinkle", route_prefix=config.http.route_prefix)
    node = ray.nodes()[0]
    _say(f"metrics at http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics")
    told = ""
    while True:
        status = ray.get(handle.ping.remote())
        if status.message != told:
            told = status.message
            _say(told)
        if status.state == "failed":
            raise UpError(status.message)
        if status.state == "ready" and _healthy(config):
            return
        time.sleep(0.1)


def _shut_down() -> None:
    import ray
    from ray import serve

    from twinkle_serve.cluster import coordinator

    serve.shutdown()
    try:
        handle = coordinator.find()
        ray.get(handle.stop.remote(), timeout=10)
    except (ValueError, ray.exceptions.RayError) as error:
        _say(f"the coordinator did not stop in order: {error}")


def _limit_stopping() -> None:
    """Whatever hangs while stopping, leave no process behind and end in time."""

    def end() -> None:
        from twinkle_serve.cluster.private_ray import descendants

        _say("stopping takes too long: killing what is left")
        for pid in descendants(os.getpid()):
            os.kill(pid, signal.SIGKILL)
        os._exit(1)

    timer = threading.Timer(STOP_S, end)
    timer.daemon = True
    timer.start()


def _require_startable(config: Config) -> None:
    """What is wrong already would fail later, in other words, and long after this."""
    from twinkle_serve.doctor import before_start

    for finding in before_start(config):
        if finding.level == "bad":
            raise UpError(finding.text)


def url_of(config: Config) -> str:
    """Where a client on this machine finds the service."""
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(config.http.host, config.http.host)
    return f"http://{in_url(host)}:{config.http.port}{config.http.route_prefix.rstrip('/')}"


def in_url(host: str) -> str:
    """The host as a URL has it."""
    return f"[{host}]" if ":" in host else host


def _healthy(config: Config) -> bool:
    try:
        # A proxy set in the environment is for the world outside.
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(f"{url_of(config)}/api/v1/healthz", timeout=5) as answer:
            return bool(answer.status == 200)
    except (urllib.error.URLError, OSError):
        return False


def _say(text: str) -> None:
    print(f"[twinkle-serve] {text}", file=sys.stderr, flush=True)
