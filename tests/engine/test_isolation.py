"""Many runs on few slots: each one's numbers are those it would have alone."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.engine.conftest import EngineFactory
from tests.engine.programs import Machine, ProgramTicks, Trace, alone, random_program
from tests.engine.sampling import drain, trained
from tests.engine.ticks import make_sample
from twinkle_serve.engine.engine import Engine
from twinkle_serve.model_config import SamplerConfig
from twinkle_serve.protocol.data import ForwardResult, LoraSpec, SampleResult

HOST_BYTES = 4 * 2**20
"""Less than the paged runs need, so most of them go to disk."""


def compare(found: Trace, expected: Trace, *, bitwise: bool) -> None:
    assert len(found.answers) == len(expected.answers)
    for one, other in zip(found.answers, expected.answers, strict=True):
        assert (one.request_id, one.failure) == (other.request_id, other.failure)
        compare_values(one.value, other.value, bitwise=bitwise)
    assert found.end is not None
    assert expected.end is not None
    assert (found.end.spec, found.end.step) == (expected.end.spec, expected.end.step)
    for name in ("weights", "grads", "exp_avg", "exp_avg_sq"):
        a, b = getattr(found.end, name), getattr(expected.end, name)
        assert (a is None) == (b is None), name
        if a is None:
            continue
        if bitwise:
            assert torch.equal(a, b), name
        else:
            assert float((a - b).norm()) <= 2e-4 * float(b.norm()), name


def compare_values(one: object, other: object, *, bitwise: bool) -> None:
    if isinstance(one, ForwardResult):
        assert isinstance(other, ForwardResult)
        a, b = np.asarray(one.logprobs.values), np.asarray(other.logprobs.values)
        if bitwise:
            assert a.tobytes() == b.tobytes()
            assert one.metrics == other.metrics
        else:
            np.testing.assert_allclose(a, b, rtol=1e-5)
            assert one.metrics == pytest.approx(dict(other.metrics), rel=1e-4, abs=1e-4)
    elif isinstance(one, SampleResult):
        assert isinstance(other, SampleResult)
        for mine, alone_ in zip(one.sequences, other.sequences, strict=True):
            assert mine.tokens.tolist() == alone_.tokens.tolist()
            np.testing.assert_allclose(mine.logprobs, alone_.logprobs, atol=1e-4)
    elif isinstance(one, dict) and not bitwise:
        assert one == pytest.approx(other, rel=1e-4)
    else:
        assert one == other


def check(engine: Engine, program: ProgramTicks, directory: Path, *, bitwise: bool) -> None:
    together = Machine(engine, directory / "together").run(program)
    for which, trace in together.items():
        solo = Machine(engine, directory / "alone").run(alone(program, which))
        compare(trace, solo[which], bitwise=bitwise)


@pytest.mark.parametrize("deterministic", [False, True])
def test_64_runs_on_8_slots_are_each_as_if_alone(
    deterministic: bool, engine_for: EngineFactory, tiny_moe: Path, tmp_path: Path
) -> None:
    engine = engine_for(tiny_moe, deterministic=deterministic, host_page_bytes=HOST_BYTES)
    program = random_program(seed=1, num_runs=64, num_ticks=40, width=8)
    check(engine, program, tmp_path, bitwise=deterministic)


@settings(
    max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], database=None
)
@given(seed=st.integers(0, 2**32), num_runs=st.integers(2, 5), slots=st.integers(1, 3))
def test_any_program_is_bitwise_isolated_in_deterministic_mode(
    seed: int,
    num_runs: int,
    slots: int,
    engine_for: EngineFactory,
    tiny_qwen3: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    engine = engine_for(tiny_qwen3, deterministic=True, max_resident_adapters=slots, host_page_bytes=0)
    program = random_program(seed, num_runs, num_ticks=10, width=min(slots, num_runs))
    check(engine, program, tmp_path_factory.mktemp("program"), bitwise=True)


def test_free_slots_are_pristine_after_a_program(
    engine_for: EngineFactory, tiny_moe: Path, tmp_path: Path
) -> None:
    engine = engine_for(tiny_moe, host_page_bytes=HOST_BYTES)
    Machine(engine, tmp_path).run(random_program(seed=2, num_runs=20, num_ticks=12, width=8))
    pool = engine.pool
    assert not any(t.any() for t in (pool.weights, pool.grads, pool.exp_avg, pool.exp_avg_sq))
    assert (set(pool.steps), set(pool.has_grads)) == ({0}, {False})


def test_samples_in_deterministic_mode_are_bitwise_those_drawn_alone(
    engine_for: EngineFactory, tiny_moe: Path
) -> None:
    """Long prompts and short ones, cut into chunks, with adapters of different ranks and without."""
    sampler = SamplerConfig(prefill_chunk_tokens=16)
    engine = engine_for(tiny_moe, deterministic=True, sampler=sampler)
    adapters = [trained(engine, slot, LoraSpec(rank, slot), f"a{slot}") for slot, rank in enumerate((3, 8))]
    rng = np.random.default_rng(0)
    asks = [
        make_sample(
            f"{number}",
            rng.integers(0, 350, length).tolist(),
            None if number % 3 == 2 else adapters[number % 3],
            max_tokens=12,
            seed=number,
            num_samples=1 + number % 2,
        )
        for number, length in enumerate((40, 5, 23, 17, 2, 33, 9))
    ]
    together = drain(engine, asks)
    for ask in asks:
        only = drain(engine, [ask])[ask.request_id]
        for mine, other in zip(together[ask.request_id].sequences, only.sequences, strict=True):
            assert mine.tokens.tolist() == other.tokens.tolist()
            assert np.asarray(mine.logprobs).tobytes() == np.asarray(other.logprobs).tobytes()
