"""The plan's bytes against an engine's, against the published figures, and against its own arithmetic."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from twinkle_serve.config import ModelConfig
from twinkle_serve.engine.engine import Engine
from twinkle_serve.engine.layout import AdapterLayout
from twinkle_serve.engine.sharding.shares import share_layout
from twinkle_serve.plan import Budget, budget_of, find_shapes
from twinkle_serve.protocol.data import LoraSpec
from twinkle_serve.testing.models import build_tiny_qwen3

QWEN3 = "ms://Qwen/Qwen3-30B-A3B"
EIGHT: dict[str, Any] = {"ranks": 8, "sharding": "expert_parallel", "gpu_memory_bytes": 85_000_000_000}


def _budget(path: str, **fields: Any) -> Budget:
    return budget_of(ModelConfig(name="m", path=path, **fields), find_shapes(path))


def _line(budget: Budget, part: str, what: str) -> int:
    (found,) = [line.num_bytes for line in budget.lines if (line.part, line.what) == (part, what)]
    return found


# against the engine -------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["tiny_moe", "tiny_llama", "tied_qwen3", "wide_qwen3"])
def directory(request: pytest.FixtureRequest) -> Path:
    found: Path = request.getfixturevalue(request.param)
    return found


@pytest.fixture(scope="module")
def tied_qwen3(models_root: Path) -> Path:
    return build_tiny_qwen3(models_root, tie_word_embeddings=True)


@pytest.fixture(scope="module")
def wide_qwen3(models_root: Path) -> Path:
    """Wide enough for some of its weights to be packed."""
    return build_tiny_qwen3(models_root, hidden_size=256)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_is_planned_is_what_an_engine_takes(directory: Path, dtype: Any) -> None:
    sizes: dict[str, Any] = {"max_resident_adapters": 3, "max_rank": 8}
    config = ModelConfig(name="tiny", path=str(directory), dtype=dtype, device="cpu", num_threads=1, **sizes)
    budget = budget_of(config, find_shapes(str(directory)))
    engine = Engine(config)
    try:
        for slot in range(3):
            engine.pool.create(slot, LoraSpec(rank=8))
        memory = engine.memory()
    finally:
        engine.close()
    is_wide = find_shapes(str(directory)).hidden == 256
    for part in ("base", "packed", "slots", "kv"):
        assert budget.part(part) == memory[part], part
    assert budget.part("adam") == memory["moments"]
    assert _line(budget, "gradients", "accumulated") == memory["gradients"]
    assert (budget.part("packed") > 0) == (dtype == "float32" and is_wide)


@pytest.mark.parametrize("ranks", [2, 4])
def test_a_rank_of_several_holds_its_experts_part_of_an_adapter(tiny_moe: Path, ranks: int) -> None:
    engine = Engine(ModelConfig(name="tiny", path=str(tiny_moe), device="cpu", num_threads=1))
    try:
        whole: AdapterLayout = engine.base.layout
    finally:
        engine.close()
    share, _ = share_layout(whole, 0, ranks)
    budget = _budget(
        str(tiny_moe), ranks=ranks, sharding="expert_parallel", max_rank=1, max_resident_adapters=1
    )
    assert _line(budget, "slots", "weights") == share.row_size * 4


def test_two_ranks_halve_the_experts_and_nothing_else(tiny_moe: Path) -> None:
    one = _budget(str(tiny_moe))
    two = _budget(str(tiny_moe), ranks=2, sharding="expert_parallel")
    experts = _line(one, "base", "experts")
    assert _line(two, "base", "experts") * 2 == experts
    assert one.part("base") - two.part("base") == experts // 2


def test_zero3_shares_what_is_in_layers_and_keeps_two_of_them_whole(tiny_llama: Path) -> None:
    one = _budget(str(tiny_llama))
    two = _budget(str(tiny_llama), ranks=2, sharding="zero3")
    gathered = _line(two, "base", "gathered layers")
    whole = sum(line.num_bytes for line in one.lines if line.what in ("embedding", "unembedding"))
    assert two.part("base") - gathered - whole == (one.part("base") - whole) // 2
    assert one.part("slots") == two.part("slots")


# against the published figures --------------------------------------------------------------------------


def test_eight_gpus_hold_ten_gigabytes_of_qwen3_30b_each() -> None:
    assert _budget(QWEN3, **EIGHT).part("base") == pytest.approx(10.3e9, rel=0.01)


def test_an_adapter_of_rank_32_takes_1_76_gigabytes_on_each_of_eight_gpus() -> None:
    """float32 weights, gradients and moments, and weights in bfloat16."""
    budget = _budget(QWEN3, **EIGHT, max_resident_adapters=1)
    backup = _line(budget, "gradients", "before the tick, to take a failure back")
    total = budget.part("slots") + budget.part("gradients") - backup + budget.part("adam")
    assert total == pytest.approx(1.76e9, rel=0.01)


# its own ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fields",
    [
        EIGHT,
        EIGHT | {"activation_checkpointing": True},
        {"ranks": 3, "sharding": "zero3", "dtype": "bfloat16"},
        {"max_context_length": 128, "microbatch_tokens": 64},
    ],
)
def test_the_arithmetic_that_is_shown_gives_the_bytes_that_are_counted(fields: dict[str, Any]) -> None:
    budget = _budget(QWEN3, **fields)
    for line in (*budget.lines, *budget.host_lines):
        formula = line.arithmetic.replace(",", "").replace(" x ", " * ")
        formula = re.sub(r"rank(s)?|slots|snapshots|experts|tokens|pairs|rows|\bB\b", "", formula)
        assert re.fullmatch(r"[\d\s*+/()]+", formula), line
        value = eval(formula)
        assert line.num_bytes - 1 < value <= line.num_bytes, line


def test_a_longer_sequence_than_a_microbatch_counts_whole() -> None:
    short = _budget(QWEN3, max_context_length=1000, microbatch_tokens=1000)
    assert short.part("activations") == _budget(QWEN3, max_context_length=128, microbatch_tokens=1000).part(
        "activations"
    )
    assert short.part("activations") < _budget(QWEN3, max_context_length=1001, microbatch_tokens=1000).part(
        "activations"
    )


def test_checkpointing_saves_activations() -> None:
    without, with_it = (
        _budget(QWEN3, activation_checkpointing=on).part("activations") for on in (False, True)
    )
    assert with_it < without / 4


def test_what_fits_and_what_does_not() -> None:
    whole = _budget(QWEN3, dtype="bfloat16").num_bytes
    assert _budget(QWEN3).fits  # nothing is known of the device
    assert not _budget(QWEN3, gpu_memory_bytes=whole).fits
    assert _budget(QWEN3, gpu_memory_bytes=int(whole * 1.1)).fits


def test_experts_that_cannot_be_shared_evenly_are_refused(tiny_llama: Path) -> None:
    with pytest.raises(ValueError, match="m: 128 experts cannot be shared evenly by 3 ranks"):
        _budget(QWEN3, ranks=3, sharding="expert_parallel")
    with pytest.raises(ValueError, match="m: 0 experts cannot"):
        _budget(str(tiny_llama), ranks=2, sharding="expert_parallel")
    alone = _budget(str(tiny_llama), ranks=1, sharding="expert_parallel")
    assert alone.lines == _budget(str(tiny_llama)).lines
