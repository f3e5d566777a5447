"""A Ray of our own on this machine: on the loopback address only, and ended to the last process.

Knows Ray's switches and this machine's process table. Does not know what runs on it.
"""

from __future__ import annotations

import ctypes
import os
import secrets
import shutil
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from twinkle_serve.cluster import haproxy
from twinkle_serve.config import RayConfig

_PR_SET_CHILD_SUBREAPER = 36
_MAX_TMPDIR_BYTES = 20
SWITCHES = {
    "RAY_USAGE_STATS_ENABLED": "0",
    # Despite its name this is what makes Ray choose 127.0.0.1 for itself and bind nothing else.
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    "RAY_AUTH_MODE": "token",
    # Ray would start the ranks at niceness 15, and a busy machine would starve them.
    "RAY_worker_niceness": "0",
    # Serve's own switch: a replica's log would otherwise repeat every request.
    "RAY_SERVE_LOG_TO_STDERR": "0",
    # One event loop a replica and one in the proxy: each hop between threads costs more than our handlers do,
    # and none of them blocks. Together a quarter of a request's CPU time.
    "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0",
    "RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP": "0",
    "RAY_SERVE_REQUEST_PATH_LOG_BUFFER_SIZE": "1000",
    # While a model loads the machine is busy; Serve would take its proxy for dead and start it over and over.
    "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "45",
    "RAY_SERVE_PROXY_HEALTH_CHECK_TIMEOUT_S": "45",
    "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "twinkle_serve.cluster.proxy_hook:middlewares",
}


@contextmanager
def private_ray(
    config: RayConfig, namespace: str, on_signal: Callable[[int], None], with_haproxy: bool = False
) -> Iterator[None]:
    """Ray while the block lasts. Call it once in a process, from the main thread, before ray is imported.

    Handlers of SIGTERM and SIGINT stay in place; while Ray starts they wait, and only ``on_signal`` hears of
    each signal at once, in a thread of its own. All processes below this one that the block started are gone
    afterwards, and so is what they left in the system's temporary directory. Raises NoHaproxy.
    """
    os.environ |= SWITCHES
    # Given in the environment, so that nothing is read from or written to the home directory.
    os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
    _adopt_orphans()
    bystanders = descendants(os.getpid())
    usual = tempfile.gettempdir()
    scratch = Path(tempfile.mkdtemp(prefix="twinkle-", dir=usual))
    # Paged adapters go there, which may be many gigabytes: whoever names a directory for them means it.
    os.environ["TMPDIR"] = str(scratch)
    # Ray puts sockets below its directory, and the name of a socket has at most 107 bytes.
    is_short = len(os.fsencode(usual)) <= _MAX_TMPDIR_BYTES
    sockets = scratch if is_short else Path(tempfile.mkdtemp(prefix="twinkle-", dir="/tmp"))
    try:
        if with_haproxy:
            os.environ |= haproxy.environment(sockets)
        import ray

        try:
            with _signals_held_back(on_signal):
                ray.init(
                    address="local",
                    namespace=namespace,
                    include_dashboard=config.dashboard,
                    dashboard_port=config.dashboard_port,
                    _metrics_export_port=config.metrics_port,
                    logging_level="warning",
                    _temp_dir=str(sockets),
                )
            yield
        finally:
            ray.shutdown()
    finally:
        end_all(descendants(os.getpid()) - bystanders)
        for directory in {scratch, sockets}:
            shutil.rmtree(directory, ignore_errors=True)


@contextmanager
def _signals_held_back(on_signal: Callable[[int], None]) -> Iterator[None]:
    """SIGTERM and SIGINT are handled after the block, in which Ray starts, however it ends: a process that
    leaves it half-way crashes at its end."""
    import ray._private.utils

    came: list[int] = []
    # It would otherwise begin by taking our place with a handler that exits at once, with an error.
    ray._private.utils.set_sigterm_handler = lambda handler: None
    numbers = (signal.SIGTERM, signal.SIGINT)
    own = {number: signal.signal(number, lambda number, _: came.append(number)) for number in numbers}
    try:
        with _heard_at_once(on_signal):
            yield
    finally:
        for number, handler in own.items():
            signal.signal(number, handler)
        if came:
            signal.raise_signal(came[0])


@contextmanager
def _heard_at_once(on_signal: Callable[[int], None]) -> Iterator[None]:
    """A thread hears of signals that have a handler: the main thread, where Python runs the handlers, may be
    inside Ray's C++ for long. Only while Ray waits for the port of its first process it lets no thread run,
    for 30 s at most."""
    heard, sent = os.pipe()
    os.set_blocking(sent, False)

    def listen() -> None:
        while number := os.read(heard, 1):
            # While it connects Ray has a handler in C++ too, that calls Python's and aborts the process 3 s
            # later.
            signal.alarm(0)
            on_signal(number[0])

    listener = threading.Thread(target=listen, daemon=True)
    listener.start()
    before = signal.set_wakeup_fd(sent)
    try:
        yield
    finally:
        signal.set_wakeup_fd(before)
        os.close(sent)
        listener.join()
        os.close(heard)


def descendants(pid: int) -> set[int]:
    """All processes below ``pid``, those that are already dead included."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with suppress(OSError):
                # The name in parentheses may hold anything; after it come the state and the parent.
                parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
                children.setdefault(parent, []).append(int(entry.name))
    found: set[int] = set()
    queue = [pid]
    while queue:
        below = children.get(queue.pop(), [])
        found.update(below)
        queue += below
    return found


def end_all(pids: set[int], patience_s: float = 3.0) -> None:
    """Wait a little for these children of ours to end by themselves, then kill them."""
    deadline = time.monotonic() + patience_s
    while pids:
        late = time.monotonic() >= deadline
        for pid in sorted(pids):
            try:
                if late:
                    os.kill(pid, signal.SIGKILL)
                gone = os.waitpid(pid, 0 if late else os.WNOHANG)[0] == pid
            except (ChildProcessError, ProcessLookupError):
                # Not a child of ours: its parent, which is on the list, reaps it or leaves it to us.
                gone = not Path(f"/proc/{pid}").exists()
            if gone:
                pids.discard(pid)
        time.sleep(0.02)


def _adopt_orphans() -> None:
    """A process whose parent dies becomes our child instead of init's, so that none escapes us."""
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1)
