"""What tests tell ranks to do: keep engines, walk ticks, show what is in a slot. Runs in the ranks."""

from __future__ import annotations

from typing import Any

import torch

from twinkle_serve.config import ModelConfig
from twinkle_serve.engine import sampler, share
from twinkle_serve.engine.engine import Engine
from twinkle_serve.engine.sharding.place import RankPlace
from twinkle_serve.engine.slots import AdapterState
from twinkle_serve.protocol.data import LoraSpec
from twinkle_serve.protocol.work import Tick

_engines: dict[str, Engine] = {}


def engine_of(place: RankPlace, config: ModelConfig) -> Engine:
    """The rank's engine for ``config``, loaded once."""
    key = config.model_dump_json()
    if key not in _engines:
        _engines[key] = Engine(config, place=place)
        assert _engines[key].probe()
    return _engines[key]


def empty(engine: Engine) -> None:
    for slot in range(engine.pool.num_slots):
        engine.pool.free(slot)


def close_all(place: RankPlace) -> None:
    for engine in _engines.values():
        engine.close()


def start_afresh(place: RankPlace, config: ModelConfig) -> None:
    """Empty slots, nothing paged out."""
    empty(engine_of(place, config))


def run_tick(place: RankPlace, config: ModelConfig, tick: Tick) -> list[Any]:
    return list(engine_of(place, config).run(tick))


def memory(place: RankPlace, config: ModelConfig) -> dict[str, int]:
    return engine_of(place, config).memory()


def whole_state(place: RankPlace, config: ModelConfig, slot: int) -> AdapterState | None:
    """The whole of what is in a slot, put together on the first rank without any file."""
    engine = engine_of(place, config)
    return engine.base.shares.assemble(engine.pool.state(slot))


def disturb(place: RankPlace, config: ModelConfig, slot: int, seed: int) -> None:
    """Make every factor that is trained random, the same as on one rank."""
    engine = engine_of(place, config)
    move(engine, slot, seed)


def move(engine: Engine, slot: int, seed: int) -> None:
    """B is zero at first, and so are the gradients of A: draw B too, the whole of it on each rank."""
    whole = engine.base.shares.assemble(engine.pool.state(slot))
    if whole is not None:
        generator = torch.Generator().manual_seed(seed)
        layout = engine.base.shares.whole
        for target in layout.targets:
            a, b_t = layout.a(whole.weights, target), layout.b_t(whole.weights, target)
            drawn = torch.randn(b_t.shape, generator=generator) * 0.05
            if a.any():
                b_t.copy_(drawn)
    state = engine.base.shares.distribute(whole)
    engine.pool.free(slot)
    engine.pool.put(slot, state)


def create(place: RankPlace, config: ModelConfig, slot: int, spec: LoraSpec) -> None:
    engine_of(place, config).pool.create(slot, spec)


def spoil(place: RankPlace, config: ModelConfig, slot: int) -> None:
    """Weights that are not finite, and only on the last rank: those of one of its own experts."""
    engine = engine_of(place, config)
    if place.rank == place.world_size - 1:
        engine.base.shares.own(engine.pool.blocks(slot)[0])[0, 0] = torch.nan


def tell_every(place: RankPlace, seconds: float) -> None:
    """How often streamed samples tell what they drew."""
    sampler._TELL_EVERY_S = seconds


def fail_in_put(place: RankPlace, config: ModelConfig, rank: int) -> None:
    """Let the next adapter that ``rank`` puts into its pool find the device full."""
    pool = engine_of(place, config)._adapters.pool
    if place.rank != rank:
        return

    def full(state: AdapterState) -> Any:
        del pool.put  # type: ignore[method-assign]
        raise torch.OutOfMemoryError("planted")

    pool.put = full  # type: ignore[method-assign]


def fail_in_loss(place: RankPlace, rank: int) -> None:
    """Let the next loss that ``rank`` computes raise what no loss should."""
    if place.rank != rank:
        return
    original = share.compute_loss

    def broken(*_: Any) -> Any:
        share.compute_loss = original
        raise RuntimeError("planted")

    share.compute_loss = broken


def fail_once(
    place: RankPlace, config: ModelConfig, rank: int, rows: int, error: Exception, direction: str
) -> None:
    """Let ``rank`` fail in the middle of its next pass with at least ``rows`` rows, between collectives. In
    the backward pass: as a layer is computed again from its checkpoint."""
    engine = engine_of(place, config)
    if place.rank != rank:
        return
    layer = engine.base.model.base_model.layers[1].mlp
    seen = []

    def hook(module: Any, inputs: Any) -> None:
        if inputs[0].shape[-2] >= rows:
            seen.append(True)
            if len(seen) == (2 if direction == "backward" else 1):
                handle.remove()
                raise error

    handle = layer.register_forward_pre_hook(hook)
