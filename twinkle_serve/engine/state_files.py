"""A run's whole state as one file that checks itself, and a thread that writes such files in the background.

Knows AdapterStates, safetensors and digests. Does not know runs, or when one is to be written.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from twinkle_serve.engine.slots import AdapterState
from twinkle_serve.protocol.data import LoraSpec
from twinkle_serve.protocol.work import Failure, Outcome
from twinkle_serve.storage.checkpoints import CheckpointDamagedError, CheckpointMissingError, write_file

logger = logging.getLogger(__name__)
_BLOCKS = ("weights", "grads", "exp_avg", "exp_avg_sq")


def pack_state(state: AdapterState, *, checked: bool = True) -> bytes:
    """Safetensors bytes with every block to the bit, and (``checked``) a digest of them."""
    blocks = {name: block for name in _BLOCKS if (block := getattr(state, name)) is not None}
    metadata = {"spec": json.dumps(asdict(state.spec)), "step": str(state.step)}
    digest = {"digest": _digest(blocks, metadata)} if checked else {}
    return save(blocks, metadata | digest)


def read_state(path: str | Path, *, checked: bool = True) -> AdapterState:
    """The state in a file of ``pack_state``'s bytes. Raises CheckpointError if it is not whole."""
    try:
        with safe_open(path, framework="pt") as file:
            metadata = dict(file.metadata() or {})
            blocks: dict[str, torch.Tensor] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except FileNotFoundError:
        raise CheckpointMissingError(f"{path} does not exist") from None
    except SafetensorError as error:
        raise CheckpointDamagedError(f"{path}: {error}") from None
    try:
        if checked and metadata.get("digest") != _digest(blocks, metadata):
            raise ValueError("its digest differs")
        if any(block.dtype != torch.float32 for block in blocks.values()):
            raise ValueError("its numbers are not float32")  # which the digest of their bytes does not see
        spec = LoraSpec(**json.loads(metadata["spec"]))
        return AdapterState(spec=spec, step=int(metadata["step"]), **blocks)
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointDamagedError(f"{path} has changed since it was written: {error}") from None


def _digest(blocks: dict[str, torch.Tensor], metadata: dict[str, str]) -> str:
    digest = hashlib.blake2b(json.dumps([metadata["spec"], metadata["step"]]).encode(), digest_size=16)
    for name in _BLOCKS:
        if name in blocks:
            digest.update(name.encode())
            digest.update(blocks[name].contiguous().numpy().data)
    return digest.hexdigest()


class StateWriter:
    """Writes states one after another, in the order they were given."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="state-writer")
        self._writing: deque[tuple[str | None, Future[int]]] = deque()

    def write(self, path: str, state: AdapterState, request_id: str | None = None) -> None:
        """Nobody may change ``state`` from now on. With a request id ``outcomes`` will tell how it went."""
        future = self._thread.submit(lambda: write_file(path, pack_state(state)))
        self._writing.append((request_id, future))

    def outcomes(self) -> Iterator[Outcome]:
        """What has been written since the last call, each with its size in bytes."""
        while self._writing and self._writing[0][1].done():
            request_id, future = self._writing.popleft()
            error = future.exception()
            if error is not None:
                logger.error("a snapshot could not be written: %s", error)
            if request_id is not None:
                yield (
                    Outcome(request_id, future.result())
                    if error is None
                    else Outcome(request_id, failure=Failure(f"not written: {error}", "server"))
                )

    def close(self) -> None:
        self._thread.shutdown()
