"""The engine: walks a tick from top to bottom on one rank and yields every request's outcome.

Knows the parts (slots, trainer, optimizer, sampler, paged adapters) and the order of a tick's fields. Does
not know who asked, in which order requests came, or ray.
"""

from __future__ import annotations

import errno
import logging
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from twinkle_serve.config import ModelConfig
from twinkle_serve.engine.adapter_files import load_adapter, save_adapter
from twinkle_serve.engine.adapter_pool import AdapterPool
from twinkle_serve.engine.attention import PackedCausal
from twinkle_serve.engine.base_model import choose_device, load_base_model
from twinkle_serve.engine.flops import with_speed
from twinkle_serve.engine.graph_loss import try_graph
from twinkle_serve.engine.memory import memory_of, weights_of
from twinkle_serve.engine.optimizer import NonFiniteGradientError, SlotStep, adamw_step
from twinkle_serve.engine.page_store import PageStore, new_page_directory
from twinkle_serve.engine.pulse import PULSE
from twinkle_serve.engine.sample_adapters import SampleAdapters
from twinkle_serve.engine.sampler import Sampler
from twinkle_serve.engine.sharding.place import RankPlace
from twinkle_serve.engine.sharding.ranks import PeerFailed, Ranks, ends_rank
from twinkle_serve.engine.sharding.sampler import SharedSampler
from twinkle_serve.engine.slots import AdapterState, SlotPool
from twinkle_serve.engine.state_files import StateWriter, read_state
from twinkle_serve.engine.trainer import NO_ADAPTER, Trainer
from twinkle_serve.faults import reach
from twinkle_serve.hub.models import resolve_model
from twinkle_serve.protocol.errors import UserError
from twinkle_serve.protocol.loss_graph import read_graph
from twinkle_serve.protocol.work import (
    DropRun,
    Failure,
    LoadAdapter,
    ModelInfo,
    OptimStep,
    Outcome,
    PageIn,
    PageOut,
    PersistRun,
    Progress,
    RestoreRun,
    SaveAdapter,
    Snapshot,
    Tick,
    TickReport,
)
from twinkle_serve.storage.checkpoints import CheckpointError

logger = logging.getLogger(__name__)

_TOLD = (ValueError, OSError, CheckpointError)
"""Of what goes wrong with a file: what ``_answer`` tells the client more of than that it is our fault."""


class Engine:
    """One rank's base model with its training slots and its sampler.

    scratch: directory for paged adapters; if None, one is made below ``config.page_dir`` and removed by
    ``close``.
    place: where this rank stands in its group; None: it is alone. All ranks of a group do the same in the
    same order: build an engine, probe it, run each tick. Only the first rank yields anything. A rank that
    cannot go on raises; its peers raise RankLost when they miss it, after ``place.timeout_s`` at the latest.
    Loading takes seconds to minutes. Raises UnsupportedModel or OSError for a model that cannot be served.
    """

    def __init__(
        self, config: ModelConfig, scratch: Path | None = None, place: RankPlace | None = None
    ) -> None:
        self._owned_scratch = new_page_directory(config.page_dir) if scratch is None else None
        scratch = scratch or self._owned_scratch
        assert scratch is not None
        self.ranks = Ranks.join(place, choose_device(config))
        self._directory = directory = self._find_model(config)
        self.base = load_base_model(config, directory, self.ranks)
        self._shares = self.base.shares
        self._weights = weights_of(self.base)
        self.pool = SlotPool(
            self.base.layout, config.max_resident_adapters, config.max_rank, self.base.device, self.base.dtype
        )
        self._trainer = Trainer(self.base, self.pool)
        self._pages = PageStore(scratch / "runs", config.host_page_bytes, overflows=True)
        self._states = StateWriter()
        self._snapshots = PageStore(scratch / "snapshots", config.host_page_bytes)
        num_rows = config.sampler.adapter_slots * config.max_rank
        pool = AdapterPool(self.base.layout, num_rows, self.base.device, self.base.dtype)
        self._adapters = SampleAdapters(self._shares, self._snapshots, pool)
        sampler = Sampler if self.ranks.size == 1 else SharedSampler
        self._sampler = sampler(self.base, self._adapters, config.sampler, directory)
        used = ", ".join(f"{use} {size / 1e9:.3g} GB" for use, size in self.memory().items())
        logger.info("rank %d of %s: %s", self.ranks.rank, config.name, used)

    def _find_model(self, config: ModelConfig) -> Path:
        """The first rank downloads what has to be; others of its machine then find it there."""
        if not self.ranks.is_first:
            self.ranks.wait_for_all(config.load_deadline_s)
        directory = resolve_model(config.path, config.revision)
        if self.ranks.is_first:
            self.ranks.wait_for_all(config.load_deadline_s)
        return directory

    @property
    def info(self) -> ModelInfo:
        return with_speed(self.base.info, self._directory, self.base.device, self.base.dtype)

    def probe(self) -> bool:
        """Whether a forward pass of the base model still works; cheap."""
        token_ids = torch.zeros(2, dtype=torch.int64, device=self.base.device)
        positions = torch.arange(2, device=self.base.device)
        self.base.enter([[(None, 2)]] * self.ranks.size)
        with torch.no_grad():
            hidden = self.base.hidden_states(token_ids, positions, PackedCausal([2]))
        return bool(torch.isfinite(hidden).all())

    def memory(self) -> dict[str, int]:
        """Bytes on this rank's device by use; see memory.memory_of. No rank asks another one."""
        own, cache = self._adapters.pool, self._sampler.cache
        return memory_of(self._weights, self.base.device, self.pool, own, cache)

    def check_loss(self, graph: str) -> Failure | None:
        """What is wrong with an uploaded loss, tried on made-up data."""
        try:
            try_graph(read_graph(graph))
        except UserError as error:
            return error.as_failure()
        return None

    def close(self) -> None:
        """The group of ranks, which other engines of this process may share, stays as it is."""
        self._states.close()
        if self._owned_scratch is not None:
            shutil.rmtree(self._owned_scratch, ignore_errors=True)

    def run(self, tick: Tick) -> Iterator[Outcome | Progress | TickReport]:
        """Walk the tick; an outcome is yielded as soon as it is known, the report last. On other ranks than
        the first nothing is yielded. Raises RankLost."""
        for item in self._walk(tick):
            if self.ranks.is_first:
                yield item

    def _walk(self, tick: Tick) -> Iterator[Outcome | Progress | TickReport]:
        clock = _PhaseClock("move")
        moves: tuple[PageOut | DropRun | PageIn, ...] = (*tick.page_out, *tick.drops, *tick.page_in)
        for move in moves:
            self._move(move)
        for restore in tick.restores:
            yield self._answer(restore.request_id, partial(self._restore, restore), "server")
        for create in tick.creates:
            yield self._answer(create.request_id, partial(self.pool.create, create.slot, create.spec))
        for load in tick.loads:
            yield self._answer(load.request_id, partial(self._load, load))
        clock.begin("passes")
        if tick.passes:
            yield from self._trainer.run(tick.passes, tick.microbatches)
        clock.begin("optim")
        if tick.optim_steps:
            yield from self._optim(tick.optim_steps)
        clock.begin("save")
        for save in tick.saves:
            yield self._answer(save.request_id, partial(self._save, save))
        for snapshot in tick.snapshots:
            yield self._answer(snapshot.request_id, partial(self._snapshot, snapshot))
        for persist in tick.persists:
            self._persist(persist)
        yield from self._states.outcomes()
        for name in tick.drop_snapshots:
            self._snapshots.drop(name)
            self._adapters.drop(name)
        clock.begin("sample")
        if tick.samples:
            reach("in sample")
        yield from self._sampler.run(tick.cancels, tick.samples, tick.decode_budget_s)
        clock.begin("report")
        yield TickReport(tick.tick_id, clock.seconds, self._sampler.num_active, self._gauges())

    def _move(self, move: PageOut | PageIn | DropRun) -> None:
        if isinstance(move, PageOut):
            self._pages.put(move.run_id, self.pool.state(move.slot))
            self.pool.free(move.slot)
        elif isinstance(move, PageIn):
            self.pool.put(move.slot, self._pages.pop(move.run_id))
        else:
            self._pages.drop(move.run_id)
            if move.slot is not None:
                self.pool.free(move.slot)

    def _answer(self, request_id: str, action: Callable[[], Any], fault: str = "user") -> Outcome:
        """The outcome of one action: what is wrong with a checkpoint is the user's to know, a bug is not.

        fault: whose a ValueError is. Among several ranks an error that they do not share leaves them in
        different places of a tick, and the group has to end.
        """
        try:
            return Outcome(request_id, action())
        except CheckpointError as error:
            logger.error("request %s: %s", request_id, error)  # names a path, not the user's to know
            return Outcome(request_id, failure=Failure("the checkpoint is missing or damaged"))
        except ValueError as error:
            return Outcome(request_id, failure=Failure(str(error), fault))
        except OSError as error:
            logger.error("request %s: %s", request_id, error)
            full = error.errno in (errno.ENOSPC, errno.EDQUOT)
            what = "the server's disk is full; nothing was saved" if full else f"disk error: {error.strerror}"
            return Outcome(request_id, failure=Failure(what, "server"))
        except Exception as error:
            if ends_rank(error) or (self.ranks.size > 1 and not isinstance(error, PeerFailed)):
                raise
            logger.exception("request %s failed", request_id)
            return Outcome(request_id, failure=Failure("internal error while doing this request", "server"))

    def _load(self, item: LoadAdapter) -> None:
        whole = self.ranks.on_first(partial(self._read_checkpoint, item), _TOLD)
        state = self._shares.distribute(whole)
        self.pool.free(item.slot)
        self.pool.put(item.slot, state)

    def _read_checkpoint(self, item: LoadAdapter) -> AdapterState:
        state = load_adapter(item.directory, self._shares.whole, item.optimizer)
        self._require_rank(state)
        if self.pool.is_occupied(item.slot):
            expected = self.pool.adapter(item.slot).spec
            if _shape(expected) != _shape(state.spec):
                raise ValueError(f"the checkpoint has {_shape(state.spec)}, this run has {_shape(expected)}")
        return state

    def _optim(self, every: Sequence[OptimStep]) -> Iterator[Outcome]:
        steps = []
        for step in every:
            if self.pool.is_occupied(step.slot):
                steps.append(step)
            else:
                yield Outcome(step.request_id, failure=NO_ADAPTER)
        work = [SlotStep(self.pool, step.slot, step.params) for step in steps]
        for step, result in zip(steps, adamw_step(work, self._shares), strict=True):
            if isinstance(result, NonFiniteGradientError):
                yield Outcome(step.request_id, failure=Failure(str(result)))
            else:
                yield Outcome(step.request_id, result)

    def _save(self, item: SaveAdapter) -> int:
        state = self._whole(partial(self.pool.state, item.slot, grads=False, optimizer=item.optimizer))
        if state is None:
            return 0
        return save_adapter(item.directory, state, self._shares.whole, self.info.name, item.manifest)

    def _snapshot(self, item: Snapshot) -> None:
        def keep() -> AdapterState:
            state = self.pool.state(item.slot, grads=False, optimizer=False)
            self._snapshots.put(item.adapter, state)
            return state

        state = self.ranks.together(keep)
        if item.path is not None and (whole := self._shares.assemble(state)) is not None:
            self._states.write(item.path, whole)

    def _restore(self, item: RestoreRun) -> None:
        reach("in replay")
        whole = self.ranks.on_first(partial(self._read_state, item.path), _TOLD)
        self.pool.put(item.slot, self._shares.distribute(whole))

    def _read_state(self, path: str) -> AdapterState:
        if not Path(path).parent.is_dir():
            # Other than a file that is missing alone, this says nothing about the run.
            raise FileNotFoundError(errno.ENOENT, "the directory of saved runs is not there", path)
        state = read_state(path)
        self._require_rank(state)
        width = self._shares.whole.row_size
        if state.weights.shape != (state.spec.rank, width):
            raise ValueError(
                f"the saved run is {list(state.weights.shape)}; of this base model it would be "
                f"{[state.spec.rank, width]}"
            )
        return state

    def _require_rank(self, state: AdapterState) -> None:
        if state.spec.rank > self.pool.max_rank:
            raise ValueError(f"rank {state.spec.rank}; this server serves at most {self.pool.max_rank}")

    def _persist(self, item: PersistRun) -> None:
        slot = item.slot
        state = partial(self._pages.get, item.run_id) if slot is None else partial(self.pool.state, slot)
        whole = self._whole(state)
        if whole is not None:
            self._states.write(item.path, whole, item.request_id)

    def _whole(self, state: Callable[[], AdapterState]) -> AdapterState | None:
        """The whole adapter on the first rank, of the shares that ``state`` gives on each."""
        return self._shares.assemble(self.ranks.together(state))

    def _gauges(self) -> dict[str, float]:
        """What all ranks hold together, and the memory of each: ``rank0/experts_bytes`` and so on."""
        totals: dict[str, float] = {}
        for rank, (gauges, memory) in enumerate(self.ranks.everyone((self._own_gauges(), self.memory()))):
            for name, value in gauges.items():
                totals[name] = totals.get(name, 0.0) + value
            totals.update({f"rank{rank}/{use}_bytes": float(size) for use, size in memory.items()})
        return totals

    def _own_gauges(self) -> dict[str, float]:
        return {
            "paged_host_bytes": float(self._pages.host_bytes),
            "paged_disk_bytes": float(self._pages.disk_bytes),
            "snapshot_host_bytes": float(self._snapshots.host_bytes),
            "kv_blocks_free": float(self._sampler.num_free_blocks),
            "kv_blocks": float(self._sampler.num_blocks),
        }


class _PhaseClock:
    """Seconds spent in each named phase of a tick."""

    def __init__(self, phase: str) -> None:
        self.seconds: dict[str, float] = {}
        self._phase, self._since = phase, time.perf_counter()
        PULSE.enter(phase)

    def begin(self, phase: str) -> None:
        now = time.perf_counter()
        self.seconds[self._phase] = now - self._since
        self._phase, self._since = phase, now
        PULSE.enter(phase)


def _shape(spec: Any) -> str:
    trained = [name for name in ("attn", "mlp", "unembed") if getattr(spec, f"train_{name}")]
    return f"rank {spec.rank} on {'+'.join(trained)}"
