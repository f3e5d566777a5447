"""Pushes published checkpoints to their owners' ModelScope repositories, with the owners' own tokens.

Knows how long a client waits and how the pushing process is started. The token goes to that process by a
pipe and nowhere else. Does not know ModelScope (hub/push.py) nor whose checkpoint it is.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import re
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from twinkle_serve.config import Config, ModelScopeConfig
from twinkle_serve.hub.push import Order, as_json
from twinkle_serve.protocol.errors import CAPACITY, BackendUnavailable, Busy, UserError
from twinkle_serve.storage.keys import PREFIX

# The SDK's patience with one request is a minute; then it asks again for five.
_WAIT_S = 40.0
_PUSHED = ("adapter_config.json", "adapter_model.safetensors")
_KEPT_ENVIRONMENT = ("PATH", "LANG", "PYTHONPATH", "SSL_CERT_FILE", "SSL_CERT_DIR", "REQUESTS_CA_BUNDLE")
_AWAY = ("NetworkError", "RequestTimeoutError", "ServerError")
_MAX_NAME = 100
_MAX_PROCESSES = 4


class Publisher:
    """Of one ingress replica. Others may be told the same: the processes push once."""

    def __init__(self, hub: ModelScopeConfig, root: Path) -> None:
        self._hub = hub
        self._memos = root / "published"
        self._pushing: dict[str, asyncio.Task[str]] = {}
        self._free = asyncio.Semaphore(_MAX_PROCESSES)

    async def push(self, tenant: str, key: str, path: str, files: Mapping[str, str]) -> str:
        """Push the adapter at the tinker path; the repository. Raises Busy when it takes longer than a
        client waits, in line or under way: asked again, it goes on waiting. Raises UserError where there is
        no adapter that others could read, BackendUnavailable."""
        digest = hashlib.sha256(f"{tenant}\n{path}".encode()).hexdigest()[:32]
        task = self._pushing.get(digest)
        if task is None:
            order = self._order(key.removeprefix(PREFIX), path, files, digest)
            task = self._pushing[digest] = asyncio.create_task(self._run_in_turn(order))
            task.add_done_callback(lambda _: self._pushing.pop(digest, None))
        try:
            async with asyncio.timeout(_WAIT_S):
                return await asyncio.shield(task)
        except TimeoutError:
            raise Busy("the checkpoint is on its way to ModelScope; ask again", CAPACITY) from None

    async def _run_in_turn(self, order: Order) -> str:
        async with self._free:
            return await _run(order)

    def _order(self, token: str, path: str, files: Mapping[str, str], digest: str) -> Order:
        if any(name not in files for name in _PUSHED):
            raise UserError(
                f"{path} has no {' and '.join(_PUSHED)} to push to ModelScope, which an encrypted export "
                "has not; it was not published"
            )
        pushed = {name: files[name] for name in _PUSHED}
        content = hashlib.sha256()
        for name in pushed:
            status = os.stat(pushed[name])
            content.update(f"{name} {status.st_ino} {status.st_size} {status.st_mtime_ns}\n".encode())
        return Order(
            self._hub.endpoint,
            token,
            repository_name(path),
            self._hub.push_visibility,
            pushed,
            str(self._memos / digest),
            content.hexdigest(),
        )


def create_publisher(config: Config) -> Publisher | None:
    """None where publishing means no more than that others of this server may read."""
    hub = config.auth.modelscope
    pushes = config.auth.mode == "modelscope" and hub.push_published
    return Publisher(hub, config.storage.root) if pushes else None


def repository_name(path: str) -> str:
    """A ModelScope repository's name for a tinker path, different for different paths."""
    name = re.sub(r"[^A-Za-z0-9_.-]+", "-", path.removeprefix("tinker://"))
    if len(name) > _MAX_NAME:
        name = f"{name[: _MAX_NAME - 17]}-{hashlib.sha256(path.encode()).hexdigest()[:16]}"
    return name


async def _run(order: Order) -> str:
    environment = {name: os.environ[name] for name in _KEPT_ENVIRONMENT if name in os.environ}
    with tempfile.TemporaryDirectory(prefix="twinkle-push-") as home:
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "twinkle_serve.hub.push",
            env=environment | {"HOME": home},
            cwd=home,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.DEVNULL,
        )
        output, _ = await process.communicate(as_json(order))
    return _repository(output)


def _repository(output: bytes) -> str:
    try:
        answer: dict[str, Any] = json.loads(output)
    except ValueError:
        raise BackendUnavailable("the push to ModelScope ended without an answer; try again") from None
    if "error" not in answer:
        return str(answer["repository"])
    if answer["error"] in _AWAY:
        raise BackendUnavailable("ModelScope does not answer; the checkpoint was not published")
    raise UserError(f"ModelScope refused the push: {answer['message']}")
