"""``make bench-sharding``: a training step on one rank and on two, with both ways of sharing the model.

The step's time, and what a rank sends, counted at the collectives and held against the formulas. With L
layers, hidden size H, R ranks and b bytes a number, expert parallelism sends 2 (R - 1) H b L for each of the
rank's own tokens forward and again backward, whatever the experts are. zero3 sends a rank's part of all the
layers' weights to all others forward and again backward, however many tokens there are. Two ranks on one
machine have no network: times say what the code costs, not what a cluster gains.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.common import Report, interleave
from twinkle_serve.config import ModelConfig
from twinkle_serve.control.microbatches import Load, pack
from twinkle_serve.engine.engine import Engine
from twinkle_serve.engine.sharding.place import RankPlace
from twinkle_serve.protocol.data import AdamParams, Column, DatumBatch, LoraSpec
from twinkle_serve.protocol.work import CreateAdapter, OptimStep, Outcome, Pass, Tick
from twinkle_serve.testing.crew import crew
from twinkle_serve.testing.models import build_bench_moe

WAYS = ("expert_parallel", "zero3")
DATUM_TOKENS = 64
NUM_TENANTS = 4
BYTES = 4  # of a float32
_engines: dict[str, Engine] = {}
_gathered = [0]


def config_of(directory: Path, ranks: int, sharding: str) -> ModelConfig:
    return ModelConfig.model_validate(
        {"name": "bench", "path": str(directory), "num_threads": 1, "ranks": ranks, "sharding": sharding}
        | {"dtype": "float32", "max_resident_adapters": NUM_TENANTS, "pack_weights": "off"}
    )


def tick_of(tokens: int) -> Tick:
    """Passes and steps of all tenants, ``tokens`` tokens together."""
    draw, passes, loads = np.random.default_rng(0), [], []
    for slot in range(NUM_TENANTS):
        lengths = np.full(max(1, tokens // NUM_TENANTS // DATUM_TOKENS), DATUM_TOKENS)
        total, widths = int(lengths.sum()), np.zeros(len(lengths), np.int32)
        columns = {
            "target_tokens": Column(draw.integers(0, 8_192, total), widths),
            "weights": Column(np.ones(total, np.float32), widths),
        }
        batch = DatumBatch(draw.integers(0, 8_192, total).astype(np.int32), lengths, columns)
        passes.append(Pass(f"pass{slot}", slot, batch.pack(), "cross_entropy", {}, True))
        loads.append(Load(slot, True, lengths.tolist()))
    steps = tuple(OptimStep(f"step{slot}", slot, AdamParams()) for slot in range(NUM_TENANTS))
    return Tick(1, passes=tuple(passes), microbatches=pack(loads, 1 << 20, False), optim_steps=steps)


def prepare(place: RankPlace | None, config: ModelConfig) -> dict[str, int]:
    """Load the model and give every tenant an adapter; what the formulas need."""
    engine = Engine(config, place=place)
    _engines[config.sharding] = engine
    if config.sharding == "zero3":
        _count_gathered()
    creates = (CreateAdapter(f"c{i}", f"run{i}", i, LoraSpec(8, i)) for i in range(NUM_TENANTS))
    list(engine.run(Tick(0, creates=tuple(creates))))
    shape = engine.base.model.config
    layers = engine.base.model.base_model.layers.parameters()
    weights = sum(int(getattr(parameter, "ds_numel", parameter.numel())) for parameter in layers)
    return {"hidden": shape.hidden_size, "layers": shape.num_hidden_layers, "weights": weights}


def step(place: RankPlace | None, sharding: str, tick: Tick) -> tuple[int, int]:
    """One tick; bytes that this rank sent: through our collectives, and through DeepSpeed's."""
    engine = _engines[sharding]
    engine.ranks.bytes_sent = _gathered[0] = 0
    outcomes = [item for item in engine.run(tick) if isinstance(item, Outcome)]
    assert all(outcome.failure is None for outcome in outcomes)
    return engine.ranks.bytes_sent, _gathered[0]


def _count_gathered() -> None:
    """Count what DeepSpeed's gathers send from this rank, which do not pass through our own collectives."""
    from deepspeed.runtime.zero import partition_parameters

    original = partition_parameters._dist_allgather_fn

    def counted(input_tensor: Any, output_tensor: Any, group: Any = None) -> Any:
        _gathered[0] += output_tensor.nbytes - input_tensor.nbytes
        return original(input_tensor, output_tensor, group)

    partition_parameters._dist_allgather_fn = counted


def measure(root: Path, tokens: int, rounds: int) -> None:
    directory, report = build_bench_moe(root), Report("sharding")
    tick = tick_of(tokens)
    with crew(2, timeout_s=600) as two:
        prepare(None, config_of(directory, 1, "single"))
        shape: dict[str, dict[str, int]] = {}
        for way in WAYS:
            shape[way] = two.run(prepare, config_of(directory, 2, way))[0]
        arms = {"one rank": lambda: step(None, "single", tick)}
        sent: dict[str, tuple[int, int]] = {}

        def together(way: str) -> None:
            sent[way] = two.run(step, way, tick)[0]

        arms |= {f"two ranks, {way}": lambda way=way: together(way) for way in WAYS}  # type: ignore[misc]
        timings = interleave(arms, rounds)
        for way in WAYS:
            ratio = timings["one rank"].wall / timings[f"two ranks, {way}"].wall
            report.row(f"{tokens} tokens: speed of two ranks, {way}, over one's", ratio, "", timings)
        own = tokens / 2
        rows = 2 * 2 * shape["expert_parallel"]["hidden"] * shape["expert_parallel"]["layers"] * BYTES
        gradients = _reduced_bytes(two.run(reduced_columns)[0])
        found = (sent["expert_parallel"][0] - gradients) / own
        report.row(f"expert_parallel: {found / 1e3:.1f} kB a token over the formula's", found / rows, "1")
        weights = 2 * shape["zero3"]["weights"] * BYTES / 2
        found = sent["zero3"][1]
        report.row(f"zero3: {found / 1e6:.1f} MB a step over the formula's", found / weights, "1")
    report.write()


def reduced_columns(place: RankPlace) -> int:
    """Columns of an adapter whose gradients are summed over the ranks at each of its steps."""
    return _engines["expert_parallel"].base.shares.num_replicated


def _reduced_bytes(columns: int) -> int:
    """What a rank of two sends to sum all tenants' gradients: once a step and not for each token."""
    return NUM_TENANTS * 8 * columns * BYTES


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.sharding", description=__doc__)
    parser.add_argument("--models", type=Path, default=Path("models"), help="where models are kept")
    parser.add_argument("--tokens", type=int, default=2_048, help="in a step, on all ranks together")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    measure(options.models, options.tokens, options.rounds)


if __name__ == "__main__":
    main()
