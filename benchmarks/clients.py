"""The measuring end of ``program.py``: starts it, tells it what to do, and waits for its answer.

Knows the pipe between the two. Does not know the SDK.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

PROGRAM = Path(__file__).with_name("program.py")


class ClientError(Exception):
    """The program ended, or an order failed; the message says how."""


class Clients:
    """A running program. Each order waits for its answer."""

    def __init__(self, process: subprocess.Popen[str], log: Path) -> None:
        self._process = process
        self._log = log

    def open(self, tenants: int, **order: Any) -> list[float]:
        """Seconds that each new tenant waited for its run."""
        return list(self._ask("open", tenants=tenants, **order)["create_s"])

    def more(self, tenants: Sequence[int], count: int = 1) -> list[float]:
        """Seconds that each of ``count`` further runs took for each of these tenants, which ask at the same
        time; the last one is what a tenant trains from now on."""
        return list(self._ask("more", tenants=list(tenants), count=count)["create_s"])

    def sample(self, count: int, tokens: int) -> dict[str, Any]:
        """So many samples at once from the base model: how many came back whole, and in what time."""
        return self._ask("sample", count=count, tokens=tokens)

    def train(self, tenants: Sequence[int], *, tokens: int, depth: int, **order: Any) -> dict[str, Any]:
        """See program.train: ``steps`` or ``seconds`` must be given."""
        return self._ask("train", tenants=list(tenants), tokens=tokens, depth=depth, **order)

    def _ask(self, do: str, **order: Any) -> dict[str, Any]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        print(json.dumps({"do": do, **order}), file=self._process.stdin, flush=True)
        line = self._process.stdout.readline()
        if not line:
            raise ClientError(f"the client program ended:\n{_tail(self._log)}")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise ClientError(f"{do}: {answer['error']}")
        return answer


@contextmanager
def clients_of(
    url: str,
    model: str,
    *,
    log: Path,
    python: str = sys.executable,
    twinkle: bool = False,
    vocabulary: int = 350,
) -> Iterator[Clients]:
    """A client program for this server, in the environment of ``python``."""
    command = [python, "-W", "ignore", str(PROGRAM), url, model, "--vocabulary", str(vocabulary)]
    command += ["--twinkle"] if twinkle else []
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "TINKER_TELEMETRY": "0", "OMP_NUM_THREADS": "1"}
    with log.open("w") as errors:
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True, env=environment
        )
        try:
            yield Clients(process, log)
        finally:
            process.kill()
            process.communicate()


def _tail(log: Path) -> str:
    return "\n".join(log.read_text(errors="replace").splitlines()[-15:])
