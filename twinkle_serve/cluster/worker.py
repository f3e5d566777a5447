"""The rank worker: the process that holds one rank's share of a base model and runs ticks on it.

Knows how to build an engine, how to hand its outcomes over, and how far it has got. Does not know other
ranks' outcomes, what an outcome means, or who asked. This is the only place where Ray and the engine meet.
"""

from __future__ import annotations

import dataclasses
import importlib
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from types import FrameType
from typing import Any, Protocol

import ray

from twinkle_serve.cluster.metrics import RayMeter
from twinkle_serve.cluster.rank_environment import free_address, prepare_environment
from twinkle_serve.cluster.rank_memory import RankMemory
from twinkle_serve.config import ModelConfig, MonitoringConfig
from twinkle_serve.control.watch import summary_of
from twinkle_serve.engine.pulse import PULSE
from twinkle_serve.engine.sharding.place import RankPlace
from twinkle_serve.logs import configure_logs
from twinkle_serve.loss_config import WhitelistedLoss
from twinkle_serve.protocol.work import Failure, ModelInfo, Outcome, Progress, Tick, TickReport

# Below this an outcome travels inside the coordinator's answer to a poll; above it the value stays in the
# object store and the ingress replica maps it from there.
INLINE_BYTES = 64 * 1024
CONCURRENCY = {"watch": 1}
_COLLECTIVES = "torch/distributed/"
_DEPTH_OF_A_WAIT = 4


class Engine(Protocol):
    """What a rank needs of engine.engine.Engine, or of a stand-in in a test."""

    @property
    def info(self) -> ModelInfo: ...

    def run(self, tick: Tick) -> Iterator[Outcome | Progress | TickReport]: ...

    def probe(self) -> bool: ...

    def check_loss(self, graph: str) -> Failure | None: ...

    def close(self) -> None: ...


@dataclasses.dataclass(frozen=True, slots=True)
class NextItem:
    """Stands in ``Outcome.value``: the value is the next item of the stream."""


@dataclasses.dataclass(frozen=True, slots=True)
class Beat:
    """How far a rank is. tick_id: of the tick it works on, or worked on last. idle_s: seconds since it last
    got on. count: how often it did so. is_waiting: it stands in a collective, so its peers are to blame.
    stack: where all of its Python threads are."""

    tick_id: int
    phase: str
    count: int
    idle_s: float
    is_waiting: bool
    stack: str


class RankWorker:
    """One rank. ``engine`` is ``module:attribute`` of a callable that takes the ModelConfig and, where there
    are several ranks, ``place=RankPlace(...)``. ``beat`` is answered while the other methods run."""

    def __init__(
        self,
        config: ModelConfig,
        rank: int,
        engine: str,
        losses: Sequence[WhitelistedLoss] = (),
        name: str | None = None,
        monitoring: MonitoringConfig | None = None,
    ) -> None:
        """name: of the group."""
        configure_logs(monitoring or MonitoringConfig(), f"rank {rank} of {name or config.name}")
        self._config = config
        self._name = name or config.name
        self._losses = losses
        self._rank = rank
        self._factory = engine
        self._engine: Engine | None = None
        self._memory: RankMemory | None = None
        self._tick_id = 0
        self._thread = 0

    def _report_memory(self) -> None:
        if self._memory is None:
            self._memory = RankMemory(RayMeter(), self._name, self._rank)
        self._memory.report()

    def __repr__(self) -> str:
        """How Ray's logs and dashboard call this actor."""
        return f"rank {self._rank} of {self._name}"

    def address(self) -> str:
        """Where the ranks could meet on this rank's node: ``tcp://host:port``, free right now."""
        return free_address()

    def node(self) -> str:
        """Ray's id of the node that this rank is on."""
        node_id: str = ray.get_runtime_context().get_node_id()
        return node_id

    def load(self, place: RankPlace | None = None) -> ModelInfo:
        """Load the model and try a step. Raises what the engine raises, or RuntimeError."""
        prepare_environment(self._config)
        if self._losses:
            # Not above: torch must not be imported before its environment is there.
            from twinkle_serve.engine.whitelist import load_losses

            load_losses(self._losses)
        module, _, attribute = self._factory.partition(":")
        build = getattr(importlib.import_module(module), attribute)
        engine: Engine = build(self._config) if place is None else build(self._config, place=place)
        if not engine.probe():
            raise RuntimeError("the model is loaded but cannot step")
        self._engine = engine
        self._report_memory()
        return engine.info

    def check_loss(self, graph: str) -> Failure | None:
        """See control.group.Group. Waits for the tick that runs."""
        assert self._engine is not None
        return self._engine.check_loss(graph)

    def close(self) -> None:
        """Remove what the engine keeps on disk. Waits for the tick that runs."""
        if self._engine is not None:
            self._engine.close()

    @ray.method(concurrency_group="watch")
    def beat(self) -> Beat:
        """How far this rank is with its tick."""
        frames = sys._current_frames()
        frames.pop(threading.get_ident(), None)
        own = frames.get(self._thread)
        return Beat(
            self._tick_id,
            PULSE.phase,
            PULSE.count,
            time.monotonic() - PULSE.at,
            own is not None and _waits(own),
            "\n".join(_words(ident, frame, ident == self._thread) for ident, frame in frames.items()),
        )

    @ray.method(num_returns="streaming")
    def run_tick(self, tick: Tick) -> Iterator[Any]:
        """Each outcome as its own object, then the TickReport; the first rank speaks for the others."""
        for item in self._items(tick):
            if isinstance(item, Outcome) and item.num_bytes > INLINE_BYTES:
                yield dataclasses.replace(item, value=NextItem(), metrics=summary_of(item.value))
                yield item.value
            else:
                yield item

    def run_short_tick(self, tick: Tick) -> list[Outcome | Progress | TickReport]:
        """All of them in one answer: for a tick that ``is_short``, where a message for each of them would
        cost more than the work."""
        return list(self._items(tick))

    def _items(self, tick: Tick) -> Iterator[Outcome | Progress | TickReport]:
        assert self._engine is not None
        self._thread = threading.get_ident()
        PULSE.enter("start")
        self._tick_id = tick.tick_id
        self._report_memory()
        for item in self._engine.run(tick):
            PULSE.beat()
            if self._rank > 0:
                continue
            if isinstance(item, Outcome):
                item = dataclasses.replace(item, num_bytes=num_bytes(item.value))
            yield item


def is_short(tick: Tick) -> bool:
    """Whether nobody waits noticeably longer for an outcome that comes together with the tick's last one.

    So it reads and writes no files and draws no tokens; and what passes answer, which is never more than
    the datums they got, is small enough to travel inside a message.
    """
    files = tick.restores or tick.loads or tick.saves or tick.snapshots or tick.persists
    draws = tick.samples or tick.cancels or tick.decode_budget_s
    return not files and not draws and sum(len(item.datums) for item in tick.passes) <= INLINE_BYTES


def _waits(frame: FrameType | None) -> bool:
    """Whether the innermost calls of a thread are those of torch's collectives."""
    for _ in range(_DEPTH_OF_A_WAIT):
        if frame is None:
            return False
        if _COLLECTIVES in frame.f_code.co_filename:
            return True
        frame = frame.f_back
    return False


def _words(ident: int, frame: FrameType, is_ticking: bool) -> str:
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    what = "the tick's thread" if is_ticking else f"thread {names.get(ident, ident)}"
    return f"{what}:\n{''.join(traceback.format_stack(frame))}"


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
