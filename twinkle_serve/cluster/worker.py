"""The rank worker: the process that holds one rank's share of a base model and runs ticks on it.

Knows how to build an engine and how to hand its outcomes over. Does not know other ranks' outcomes, what an
outcome means, or who asked. This is the only place where Ray and the engine meet.
"""

from __future__ import annotations

import dataclasses
import importlib
import os
from collections.abc import Iterator, Mapping
from typing import Any, Protocol

import ray

from twinkle_serve.config import ModelConfig
from twinkle_serve.protocol.work import ModelInfo, Outcome, Progress, Tick, TickReport

# Below this an outcome travels inside the coordinator's answer to a poll; above it the value stays in the
# object store and the ingress replica maps it from there.
INLINE_BYTES = 64 * 1024


class Engine(Protocol):
    """What a rank needs of engine.engine.Engine, or of a stand-in in a test."""

    @property
    def info(self) -> ModelInfo: ...

    def run(self, tick: Tick) -> Iterator[Outcome | Progress | TickReport]: ...

    def probe(self) -> bool: ...

    def close(self) -> None: ...


@dataclasses.dataclass(frozen=True, slots=True)
class NextItem:
    """Stands in ``Outcome.value``: the value is the next item of the stream."""


class RankWorker:
    """One rank. ``engine`` is ``module:attribute`` of a callable that takes the ModelConfig."""

    def __init__(self, config: ModelConfig, rank: int, engine: str) -> None:
        self._config = config
        self._rank = rank
        self._factory = engine
        self._engine: Engine | None = None

    def __repr__(self) -> str:
        """How Ray's logs and dashboard call this actor."""
        return f"rank {self._rank} of {self._config.name}"

    def load(self) -> ModelInfo:
        """Load the model and try a step. Raises what the engine raises, or RuntimeError."""
        # Read when torch is imported, which must not happen before.
        threads = self._config.num_threads or max(1, (os.cpu_count() or 1) // self._config.ranks)
        os.environ["OMP_NUM_THREADS"] = str(threads)
        # Threads that spin while they wait make a step ten times slower as soon as others want the cores.
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
        module, _, attribute = self._factory.partition(":")
        engine: Engine = getattr(importlib.import_module(module), attribute)(self._config)
        if not engine.probe():
            raise RuntimeError("the model is loaded but cannot step")
        self._engine = engine
        return engine.info

    def close(self) -> None:
        """Remove what the engine keeps on disk. Waits for the tick that runs."""
        if self._engine is not None:
            self._engine.close()

    @ray.method(num_returns="streaming")
    def run_tick(self, tick: Tick) -> Iterator[Any]:
        """Each outcome as its own object, then the TickReport; the first rank speaks for the others."""
        assert self._engine is not None
        for item in self._engine.run(tick):
            if self._rank > 0:
                continue
            if isinstance(item, Outcome) and num_bytes(item.value) > INLINE_BYTES:
                yield dataclasses.replace(item, value=NextItem())
                yield item.value
            else:
                yield item


def num_bytes(value: Any) -> int:
    """About how many bytes of arrays, bytes and text a result holds."""
    if hasattr(value, "nbytes"):
        return int(value.nbytes)
    if isinstance(value, bytes | str):
        return len(value)
    if isinstance(value, Mapping):
        return sum(num_bytes(item) for item in value.values())
    if isinstance(value, list | tuple):
        return sum(num_bytes(item) for item in value)
    if dataclasses.is_dataclass(value):
        return sum(num_bytes(getattr(value, field.name)) for field in dataclasses.fields(value))
    return 8
