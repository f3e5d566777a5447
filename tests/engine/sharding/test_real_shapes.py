"""Two layers with the real shapes of Qwen3-30B-A3B: two ranks load, train, sample and export them.

3.7 GB on disk and about 6 GB of memory: runs with TWINKLE_SHARDING_LONG set.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open

from tests.engine.sharding import remote
from tests.engine.sharding.compare import passes
from tests.engine.sharding.conftest import sharded
from tests.engine.sharding.test_random import long
from tests.engine.ticks import ADAM, make_sample, random_batch
from twinkle_serve.engine.sharding.place import RankPlace
from twinkle_serve.model_config import ModelConfig, SamplerConfig
from twinkle_serve.protocol.data import LoraSpec
from twinkle_serve.protocol.work import CreateAdapter, OptimStep, Outcome, SaveAdapter, Tick
from twinkle_serve.testing.crew import crew
from twinkle_serve.testing.real_shapes import build_real_shapes, qwen3_30b_config


def own_bytes() -> int:
    """Memory of this process that is not a mapped file: files are read through such maps."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise AssertionError


@contextmanager
def watched_memory() -> Iterator[list[int]]:
    peak, done = [0], threading.Event()

    def watch() -> None:
        while not done.wait(0.02):
            peak[0] = max(peak[0], own_bytes())

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield peak
    finally:
        done.set()
        thread.join()


def load(place: RankPlace, config: ModelConfig) -> tuple[int, dict[str, int]]:
    before = own_bytes()
    with watched_memory() as peak:
        engine = remote.engine_of(place, config)
    return peak[0] - before, engine.memory()


@long
@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_two_layers_of_qwen3_30b(tmp_path: Path) -> None:
    torch.manual_seed(0)
    size = build_real_shapes(tmp_path / "model")
    assert 3.6e9 < size < 3.8e9
    config = sharded(
        tmp_path / "model",
        2,
        "expert_parallel",
        dtype="bfloat16",
        max_resident_adapters=1,
        max_rank=8,
        sampler=SamplerConfig(kv_cache_tokens=1024, adapter_slots=1),
    )
    with crew(2, timeout_s=600) as two:
        loaded = two.run(load, config, deadline_s=900)
        for peak, memory in loaded:
            assert memory["base"] < 0.7 * size
            assert memory["experts"] * 2 == pytest.approx(2 * 128 * 3 * 768 * 2048 * 2)
            assert peak < 1.15 * memory["base"] + 0.5e9, "more was in memory than what is kept"
        batch = random_batch(np.random.default_rng(0), [24, 9, 30])
        run = [
            Tick(1, creates=(CreateAdapter("create", "run", 0, LoraSpec(8, 1)),)),
            Tick(2, **passes([(0, batch, "cross_entropy")]), optim_steps=(OptimStep("step", 0, ADAM),)),
            Tick(3, **passes([(0, batch, "cross_entropy")])),
            Tick(4, saves=(SaveAdapter("save", 0, str(tmp_path / "adapter"), True, {}),)),
            Tick(5, samples=(make_sample("sample", [1, 2, 3], max_tokens=4, seed=1),), decode_budget_s=600.0),
        ]
        said: list[Outcome] = []
        for tick in run:
            items, _ = two.run(remote.run_tick, config, tick, deadline_s=600)
            said += [item for item in items if isinstance(item, Outcome)]
        two.run(remote.close_all)
    assert [outcome.failure for outcome in said] == [None] * len(said)
    assert said[3].value.metrics["loss:sum"] < said[1].value.metrics["loss:sum"]
    assert len(said[-1].value.sequences[0].tokens) == 4
    layers = qwen3_30b_config(2).num_hidden_layers
    with safe_open(tmp_path / "adapter" / "adapter_model.safetensors", "pt") as file:
        assert len(list(file.keys())) == layers * (4 + 3 * 128) * 2 + 2
        key = "base_model.model.model.layers.1.mlp.experts.127.down_proj.lora_B.weight"
        assert file.get_slice(key).get_shape() == [2048, 8]
        assert file.get_tensor(key).any()
