"""Tenants in the sampler: whoever comes late is served soon, and nobody's tokens change for it."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.engine.conftest import EngineFactory
from tests.engine.sampling import PROMPT, assert_nothing_left, drain, trained
from tests.engine.ticks import make_sample, run, value
from twinkle_serve.engine.engine import Engine
from twinkle_serve.engine.sequences import Job
from twinkle_serve.engine.turns import Turns, is_crowded
from twinkle_serve.model_config import SamplerConfig
from twinkle_serve.protocol.data import LoraSpec
from twinkle_serve.protocol.work import Outcome, Sample


def of(tenant: str, name: str, prompt: list[int] = PROMPT, adapter: Any = None, **fields: Any) -> Sample:
    return replace(make_sample(name, prompt, adapter, **{"seed": 3, "top_k": 5, **fields}), tenant=tenant)


def steps_until(engine: Engine, name: str, *samples: Sample) -> tuple[int, dict[str, Outcome]]:
    """How many steps of the sampler it takes to answer ``name``, and all that was answered by then."""
    found = run(engine, samples=samples, decode_budget_s=1e-9)
    for step in range(1, 2000):
        if name in found:
            return step, found
        found |= run(engine, decode_budget_s=1e-9)
    raise AssertionError(f"{name} is not answered")


@pytest.mark.parametrize("fields", [{}, {"deterministic": True}])
def test_many_samples_of_one_tenant_do_not_keep_another_s_from_beginning(
    fields: dict[str, Any], engine_for: EngineFactory, tiny_moe: Path
) -> None:
    engine = engine_for(tiny_moe, sampler=SamplerConfig(max_batch=4), **fields)
    many = of("many", "many", num_samples=40, max_tokens=120)
    run(engine, samples=(many, of("many", "more", max_tokens=120)), decode_budget_s=1e-9)
    steps, found = steps_until(engine, "few", of("few", "few", num_samples=2, max_tokens=6))
    assert steps < 25
    assert list(found) == ["few"]
    found = run(engine, decode_budget_s=120)
    alone = drain(engine, [many])["many"]
    for one, other in zip(value(found["many"]).sequences, alone.sequences, strict=True):
        assert one.tokens.tolist() == other.tokens.tolist()
    assert_nothing_left(engine)


def test_a_full_cache_makes_room_for_a_tenant_that_has_nothing_in_it(
    engine_for: EngineFactory, tiny_moe: Path, moe: Engine
) -> None:
    small = engine_for(
        tiny_moe, sampler=SamplerConfig(kv_cache_tokens=256, max_batch=16, prefill_chunk_tokens=16)
    )
    hoard = of("hoard", "hoard", num_samples=12, max_tokens=200)
    late = of("late", "late", list(range(100)), max_tokens=3, prompt_logprobs=True)
    run(small, samples=(hoard,), decode_budget_s=1e-9)
    while small._sampler.num_free_blocks > 2:
        assert run(small, decode_budget_s=1e-9) == {}
    steps, found = steps_until(small, "late", late)
    assert steps < 20
    assert list(found) == ["late"]
    found |= run(small, decode_budget_s=120)
    assert_nothing_left(small)
    expected = drain(moe, [hoard, late])
    for name, result in expected.items():
        for one, other in zip(value(found[name]).sequences, result.sequences, strict=True):
            assert one.tokens.tolist() == other.tokens.tolist()
            np.testing.assert_allclose(one.logprobs, other.logprobs, atol=1e-4)


def test_prompts_of_one_tenant_do_not_keep_another_s_paused_samples_from_going_on(
    engine_for: EngineFactory, tiny_moe: Path
) -> None:
    """A flood of long prompts to score, and few samples: both get on."""
    small = engine_for(
        tiny_moe, sampler=SamplerConfig(kv_cache_tokens=256, max_batch=8, prefill_chunk_tokens=64)
    )
    run(small, samples=(of("few", "few", num_samples=4, max_tokens=50),), decode_budget_s=1e-9)
    flood = [of("flood", f"{n}", [n % 300, *range(150)], max_tokens=1) for n in range(120)]
    steps, found = steps_until(small, "few", *flood)
    assert steps < 180
    assert 0 < len(found) - 1 < 119
    run(small, decode_budget_s=120)
    assert_nothing_left(small)


def test_what_waits_for_a_place_of_an_adapter_holds_up_nobody_who_needs_none(
    engine_for: EngineFactory, tiny_moe: Path
) -> None:
    engine = engine_for(tiny_moe, max_rank=8, sampler=SamplerConfig(adapter_slots=1))
    refs = [trained(engine, slot, LoraSpec(8, slot), f"place{slot}") for slot in range(2)]
    samples = [of("a", f"{n}", adapter=ref, max_tokens=100) for n, ref in enumerate(refs)]
    run(engine, samples=tuple(samples), decode_budget_s=1e-9)
    steps, found = steps_until(engine, "base", of("b", "base", max_tokens=3))
    assert (steps <= 4, list(found)) == (True, ["base"])
    assert set(run(engine, decode_budget_s=120)) == {"0", "1"}


def test_a_newcomer_has_nothing_saved_up_and_nothing_to_make_good() -> None:
    turns = Turns()
    jobs = {name: Job(of(name, name), 1, 0) for name in "abc"}
    turns.enter("a", set())
    turns.served("a", 100)
    turns.enter("b", {"a"})
    assert turns.in_turn(jobs[name] for name in "ab") == [jobs["a"], jobs["b"]]  # alike: as they came
    turns.served("b", 7)
    turns.enter("c", {"b"})  # a has left
    turns.enter("a", {"b", "c"})
    turns.served("b", 1)
    assert turns.in_turn(jobs[name] for name in "bca") == [jobs["c"], jobs["a"], jobs["b"]]


def test_who_may_start() -> None:
    turns = Turns()
    for name in "ab":
        turns.enter(name, set("ab"[: "ab".index(name)]))
    running = [Job(of("a", "r", num_samples=3), 1, 0)]
    large, small, other = (
        Job(of("a", "large", num_samples=2), 1, 0),
        Job(of("a", "small"), 1, 0),
        Job(of("b", "other", num_samples=9), 1, 0),
    )
    assert turns.admissible([large, small, other], running, 4) == [other]
    assert turns.admissible([small, large], running, 4) == [small]
    assert turns.admissible([large], [], 1) == [large]


def test_only_company_makes_a_crowd() -> None:
    assert not is_crowded("a", Counter(a=9), 4)
    assert not is_crowded("a", Counter(b=9), 4)
    assert is_crowded("a", Counter(a=1, b=8), 4)
    assert not is_crowded("a", Counter(a=1, b=2), 4)
