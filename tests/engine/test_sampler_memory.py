"""Sampling when room is short, over several ticks, and when something goes wrong."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.engine.conftest import EngineFactory
from tests.engine.sampling import PROMPT, assert_logprobs, assert_nothing_left, dense, drain, trained
from tests.engine.ticks import (
    VOCAB_SIZE,
    create,
    forward_backward,
    make_sample,
    optim_step,
    random_batch,
    run,
    sample,
    snapshot,
    value,
)
from twinkle_serve.engine.adapter_pool import Pooled
from twinkle_serve.engine.engine import Engine
from twinkle_serve.engine.kv_cache import BLOCK_TOKENS
from twinkle_serve.engine.slots import AdapterState
from twinkle_serve.model_config import SamplerConfig
from twinkle_serve.protocol.data import LoraSpec
from twinkle_serve.protocol.work import AdapterRef, Failure, Outcome, Sample, SaveAdapter, Tick, TickReport


@pytest.fixture(autouse=True)
def _no_block_leaks(moe: Engine) -> Any:
    yield
    assert_nothing_left(moe)


# The cache ------------------------------------------------------------------------------------------------

TINY_CACHE = SamplerConfig(kv_cache_tokens=256, max_batch=16, prefill_chunk_tokens=16)


def crowd(num_samples: int = 1) -> list[Sample]:
    """More than the cache holds. top_k leaves few edges between tokens: a random number that falls within
    the rounding of one, which happens once in some thousand draws among all words, may take either side."""
    rng = np.random.default_rng(1)
    return [
        make_sample(
            f"{i}",
            rng.integers(0, VOCAB_SIZE, 5 + 6 * i).tolist(),
            max_tokens=16 + 3 * i,
            seed=i,
            top_k=5,
            num_samples=num_samples,
            prompt_logprobs=True,
        )
        for i in range(9)
    ]


@pytest.mark.parametrize("num_samples", [1, 3])
def test_preemption_changes_nothing(
    num_samples: int, moe: Engine, engine_for: EngineFactory, tiny_moe: Path
) -> None:
    small = engine_for(tiny_moe, sampler=TINY_CACHE)
    found, expected = drain(small, crowd(num_samples)), drain(moe, crowd(num_samples))
    for name, result in expected.items():
        for one, other in zip(found[name].sequences, result.sequences, strict=True):
            assert one.tokens.tolist() == other.tokens.tolist()
            assert one.stop_reason == other.stop_reason
            np.testing.assert_allclose(one.logprobs, other.logprobs, atol=1e-4)
        scores = found[name].prompt_logprobs
        assert scores is not None
        assert result.prompt_logprobs is not None
        np.testing.assert_allclose(scores, result.prompt_logprobs, atol=1e-4)
    assert_nothing_left(small)


def test_many_samples_of_one_prompt_fit_where_they_end_one_after_another(
    engine_for: EngineFactory, tiny_moe: Path, moe: Engine
) -> None:
    """The cache holds three such samples; those that ended must make room for those that go on."""
    small = engine_for(tiny_moe, sampler=TINY_CACHE)
    wanted = {"max_tokens": 70, "seed": 4, "num_samples": 8, "top_k": 5}
    found, expected = sample(small, PROMPT, **wanted), sample(moe, PROMPT, **wanted)
    assert [len(s.tokens) for s in found.sequences] == [70] * 8
    assert [s.tokens.tolist() for s in found.sequences] == [s.tokens.tolist() for s in expected.sequences]
    assert_nothing_left(small)


def test_a_sample_that_fills_the_cache_alone_ends_there(engine_for: EngineFactory, tiny_moe: Path) -> None:
    small = engine_for(tiny_moe, sampler=TINY_CACHE)
    (sequence,) = sample(small, PROMPT, max_tokens=1000, seed=1).sequences
    assert sequence.stop_reason == "length"
    assert len(PROMPT) + len(sequence.tokens) == 256
    (sequence,) = sample(small, [1] * 256, max_tokens=10, seed=1).sequences
    assert (len(sequence.tokens), sequence.stop_reason) == (1, "length")
    failure = run(small, samples=(make_sample("s", [1] * 257),), decode_budget_s=9)["s"].failure
    assert failure is not None
    assert "256" in failure.message
    assert_nothing_left(small)


def test_a_cache_of_a_broken_block_holds_what_its_whole_blocks_hold(
    engine_for: EngineFactory, tiny_moe: Path
) -> None:
    odd = engine_for(tiny_moe, sampler=SamplerConfig(kv_cache_tokens=263))
    assert len(sample(odd, [1] * 256, max_tokens=1).sequences[0].tokens) == 1
    outcome = run(odd, samples=(make_sample("s", [1] * 259, max_tokens=1),), decode_budget_s=9)["s"]
    assert outcome.failure is not None
    assert outcome.failure.category == "user"


def test_a_prompt_s_scores_take_memory_only_once_it_is_read(
    engine_for: EngineFactory, tiny_moe: Path
) -> None:
    engine = engine_for(tiny_moe, sampler=SamplerConfig(max_batch=1))
    samples = tuple(
        make_sample(name, PROMPT, max_tokens=50, topk_prompt_logprobs=3) for name in ("runs", "waits")
    )
    run(engine, samples=samples, decode_budget_s=1e-9)
    (running,), (waiting,) = engine._sampler._running.values(), engine._sampler._waiting
    assert running.scores is not None
    assert waiting.scores is None
    assert value(run(engine, cancels=("runs",), decode_budget_s=60)["waits"]).topk_prompt is not None


def test_best_tokens_take_the_memory_of_their_own_k(moe: Engine) -> None:
    """Not that of a neighbour in the batch who asks for more."""
    samples = tuple(
        make_sample(f"{k}", PROMPT, max_tokens=64, seed=k, topk_sample_logprobs=k) for k in (1, 40)
    )
    list(moe.run(Tick(1, samples=samples, decode_budget_s=1e-9)))
    kept = [part for s in moe._sampler._decoding for part in (*s.topk_ids, *s.topk_logprobs) if s.topk == 1]
    assert kept
    assert all(part.base is None for part in kept)
    run(moe, cancels=("1", "40"))


def test_samples_of_one_prompt_share_it(moe: Engine) -> None:
    prompt = list(range(8 * BLOCK_TOKENS + 1))
    request = make_sample("s", prompt, max_tokens=4, num_samples=6, seed=1)
    first = list(moe.run(Tick(1, samples=(request,), decode_budget_s=1e-9)))
    report = first[-1]
    assert isinstance(report, TickReport)
    used = moe.base.config.sampler.kv_cache_tokens // BLOCK_TOKENS - report.gauges["kv_blocks_free"]
    assert used == 8 + 6
    rest = run(moe, decode_budget_s=60)
    assert len(value(rest["s"]).sequences) == 6


def test_a_tick_goes_on_where_the_last_one_stopped(moe: Engine) -> None:
    expected = sample(moe, PROMPT, max_tokens=10, seed=1).sequences[0].tokens.tolist()
    request = make_sample("s", PROMPT, max_tokens=10, seed=1)
    outcomes: list[Outcome] = []
    ticks = 0
    while not outcomes:
        ticks += 1
        samples = (request,) if ticks == 1 else ()
        *outcomes, report = list(moe.run(Tick(ticks, samples=samples, decode_budget_s=1e-9)))  # type: ignore[assignment]
        assert isinstance(report, TickReport)
        assert report.active_samples == (0 if outcomes else 1)
    assert ticks == 9  # the first step prefills and decodes
    assert value(outcomes[0]).sequences[0].tokens.tolist() == expected


def test_without_a_budget_samples_are_only_admitted(moe: Engine) -> None:
    *outcomes, report = list(moe.run(Tick(1, samples=(make_sample("s", PROMPT, max_tokens=1),))))
    assert outcomes == []
    assert isinstance(report, TickReport)
    assert report.active_samples == 1
    assert list(run(moe, decode_budget_s=1.0)) == ["s"]


def test_a_cancelled_sample_says_how_far_it_came(moe: Engine) -> None:
    long = make_sample("long", PROMPT, max_tokens=1000, num_samples=2)
    run(moe, samples=(long,), decode_budget_s=1e-9)
    for _ in range(4):
        run(moe, decode_budget_s=1e-9)
    ended = run(moe, cancels=("long",), decode_budget_s=1.0)["long"]
    assert ended.failure == Failure("cancelled")
    assert ended.metrics["prompt_tokens"] == len(PROMPT)
    assert ended.metrics["sampled_tokens"] >= 8
    assert_nothing_left(moe)


def test_a_sample_that_is_cancelled_in_its_prompt_says_how_much_of_that_was_read(
    engine_for: EngineFactory, tiny_moe: Path
) -> None:
    small = engine_for(tiny_moe, sampler=TINY_CACHE)
    chunk = TINY_CACHE.prefill_chunk_tokens
    run(small, samples=(make_sample("read", range(20, chunk + 23)),), decode_budget_s=1e-9)
    ended = run(small, cancels=("read",))["read"]
    assert ended.metrics == {"prompt_tokens": chunk, "sampled_tokens": 0}
    assert_nothing_left(small)


def test_cancelled_samples_give_no_result_and_leave_nothing(
    engine_for: EngineFactory, tiny_moe: Path
) -> None:
    small = engine_for(tiny_moe, sampler=TINY_CACHE)
    samples = crowd(2)
    run(small, samples=tuple(samples), decode_budget_s=1e-9)
    run(small, decode_budget_s=1e-9)
    kept = "3"
    cancels = tuple(s.request_id for s in samples if s.request_id != kept)
    found = run(small, cancels=(*cancels, "unknown"), decode_budget_s=60)
    assert [request_id for request_id, outcome in found.items() if outcome.failure is None] == [kept]
    assert_nothing_left(small)


def test_a_step_that_fails_fails_what_was_running_and_leaks_nothing(
    moe: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*args: object, **kwargs: object) -> None:
        raise RuntimeError("planted")

    monkeypatch.setattr(moe.base.model.base_model.rotary_emb, "forward", broken)
    found = run(
        moe, samples=(make_sample("a", PROMPT), make_sample("b", PROMPT, num_samples=3)), decode_budget_s=9
    )
    for name in ("a", "b"):
        failure = found[name].failure
        assert failure is not None
        assert failure.category == "server"
        assert "planted" not in failure.message
    monkeypatch.undo()
    assert_nothing_left(moe)
    assert len(sample(moe, PROMPT, max_tokens=3).sequences[0].tokens) == 3


@pytest.mark.parametrize("where", ["step", "adapter"])
def test_a_lost_device_ends_the_rank_and_fails_nobody(
    moe: Engine, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    """The samples are asked for again once the group is back."""
    ref = trained(moe, 0, LoraSpec(rank=4, seed=3), f"lost {where}")

    def lost(*args: object, **kwargs: object) -> None:
        raise torch.AcceleratorError("planted")

    if where == "step":
        monkeypatch.setattr(moe.base.model.base_model.rotary_emb, "forward", lost)
    else:
        monkeypatch.setattr(moe._adapters.pool, "put", lost)
    with pytest.raises(torch.AcceleratorError):
        run(moe, samples=(make_sample("a", PROMPT, ref),), decode_budget_s=9)
    monkeypatch.undo()
    run(moe, cancels=("a",))


# Adapters -------------------------------------------------------------------------------------------------


def test_a_snapshot_is_not_changed_by_later_training(moe: Engine) -> None:
    ref = trained(moe, 0, LoraSpec(rank=8, seed=6), "frozen")
    before = sample(moe, PROMPT, ref, max_tokens=10, seed=1).sequences[0]
    forward_backward(moe, 0, random_batch(np.random.default_rng(0), [9]))
    optim_step(moe, 0)
    after = sample(moe, PROMPT, ref, max_tokens=10, seed=1).sequences[0]
    np.testing.assert_array_equal(after.logprobs, before.logprobs)
    moe.pool.free(0)
    gone = sample(moe, PROMPT, ref, max_tokens=10, seed=1).sequences[0]
    np.testing.assert_array_equal(gone.logprobs, before.logprobs)


def test_eviction_from_the_adapter_cache_is_not_seen(engine_for: EngineFactory, tiny_moe: Path) -> None:
    """Two places, five snapshots, all of them in use at once."""
    engine = engine_for(tiny_moe, sampler=SamplerConfig(adapter_slots=2))
    refs = [trained(engine, slot, LoraSpec(rank=2 + slot, seed=slot), f"many{slot}") for slot in range(5)]
    samples = [make_sample(f"{i}", PROMPT, ref, max_tokens=8, seed=1) for i, ref in enumerate(refs)]
    together = drain(engine, samples)
    for i, ref in enumerate(refs):
        assert_logprobs(dense(engine, i, tiny_moe).logits, PROMPT, together[f"{i}"].sequences[0])
        alone = sample(engine, PROMPT, ref, max_tokens=8, seed=1).sequences[0]
        assert alone.tokens.tolist() == together[f"{i}"].sequences[0].tokens.tolist()


def test_an_adapter_that_waits_for_room_is_read_once(
    engine_for: EngineFactory, tiny_moe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many samples with the others end meanwhile."""
    engine = engine_for(tiny_moe, max_rank=8, sampler=SamplerConfig(adapter_slots=2))
    create(engine, 0, LoraSpec(rank=8, seed=1))
    directories = [str(tmp_path / f"{i}") for i in range(3)]
    run(engine, saves=tuple(SaveAdapter(path, 0, path, False, {}) for path in directories))
    read, reads = engine._adapters._read_whole, []
    monkeypatch.setattr(engine._adapters, "_read_whole", lambda path: (reads.append(path), read(path))[1])
    refs = [AdapterRef(f"waits{i}", path) for i, path in enumerate(directories)]
    samples = [make_sample(f"{i}", PROMPT, refs[i % 2], max_tokens=1 + i, seed=i) for i in range(30)]
    drain(engine, [*samples, make_sample("third", PROMPT, refs[2], max_tokens=2)])
    assert reads == directories


def test_whoever_comes_after_one_that_waited_for_room_is_admitted(
    engine_for: EngineFactory, tiny_moe: Path
) -> None:
    """Its client has gone; the room it waited for is still taken."""
    engine = engine_for(tiny_moe, max_rank=8, sampler=SamplerConfig(adapter_slots=2))
    refs = [trained(engine, slot, LoraSpec(rank=8, seed=slot), f"after{slot}") for slot in range(3)]
    samples = [
        make_sample("0", PROMPT, refs[0], max_tokens=300),
        make_sample("1", PROMPT, refs[1], max_tokens=300),
        make_sample("2", PROMPT, refs[2], max_tokens=300),
        make_sample("3", PROMPT, max_tokens=2),
    ]
    assert run(engine, samples=tuple(samples), decode_budget_s=1e-9) == {}
    found: dict[str, Outcome] = {}
    for cancels in (("2",), (), ()):
        found |= run(engine, cancels=cancels, decode_budget_s=1e-9)
    assert list(found) == ["3"]
    run(engine, cancels=("0", "1"))


def test_a_dropped_snapshot_is_gone_but_running_samples_finish(moe: Engine) -> None:
    ref = trained(moe, 0, LoraSpec(rank=4, seed=8), "dropped")
    expected = sample(moe, PROMPT, ref, max_tokens=12, seed=1).sequences[0].tokens.tolist()
    run(moe, samples=(make_sample("s", PROMPT, ref, max_tokens=12, seed=1),), decode_budget_s=1e-9)
    found = run(moe, drop_snapshots=("dropped",), decode_budget_s=60)
    assert value(found["s"]).sequences[0].tokens.tolist() == expected
    refused = run(moe, samples=(make_sample("late", PROMPT, ref),), decode_budget_s=60)["late"]
    assert refused.failure is not None
    assert "gone" in refused.failure.message


def test_an_adapter_that_cannot_be_placed_fails_one_sample_and_holds_up_nobody(
    moe: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    ref = trained(moe, 0, LoraSpec(rank=4, seed=2), "unplaced")
    failures = [torch.OutOfMemoryError("planted")]
    put = moe._adapters.pool.put

    def full_once(state: AdapterState) -> Pooled:
        if failures:
            raise failures.pop()
        return put(state)

    monkeypatch.setattr(moe._adapters.pool, "put", full_once)
    samples = (
        make_sample("before", PROMPT, max_tokens=3),
        make_sample("full", PROMPT, ref, max_tokens=3),
        make_sample("again", PROMPT, ref, max_tokens=3),
    )
    found = run(moe, samples=samples, decode_budget_s=9)
    failure = found["full"].failure
    assert failure is not None
    assert failure.category == "server"
    assert "planted" not in failure.message
    assert [len(value(found[name]).sequences[0].tokens) for name in ("before", "again")] == [3, 3]


def test_a_missing_checkpoint_is_refused_without_its_path(moe: Engine, tmp_path: Path) -> None:
    ref = AdapterRef("somewhere", str(tmp_path / "secret-place"))
    failure = run(moe, samples=(make_sample("s", PROMPT, ref),), decode_budget_s=9)["s"].failure
    assert failure is not None
    assert "secret-place" not in failure.message


def test_diverged_weights_fail_and_disturb_nobody(moe: Engine) -> None:
    create(moe, 0, LoraSpec(rank=4, seed=1), moved=True)
    moe.pool.blocks(0)[0].mul_(1e30)
    bad = snapshot(moe, 0, "diverged")
    alone = sample(moe, PROMPT, max_tokens=10, seed=1).sequences[0]
    found = run(
        moe,
        samples=(
            make_sample("bad", PROMPT, bad, max_tokens=10, num_samples=2, topk_sample_logprobs=3),
            make_sample("cut", PROMPT, bad, max_tokens=10, top_k=5, top_p=0.5, temperature=0.7),
            make_sample("greedy", PROMPT, bad, max_tokens=10, temperature=0.0),
            make_sample("good", PROMPT, max_tokens=10, seed=1),
        ),
        decode_budget_s=60,
    )
    for name in ("bad", "cut", "greedy"):
        failure = found[name].failure
        assert failure is not None
        assert failure.category == "user"
        assert "diverged" in failure.message
        assert found[name].value is None
    assert value(found["good"]).sequences[0].tokens.tolist() == alone.tokens.tolist()


def test_sampling_works_with_activation_checkpointing(
    engine_for: EngineFactory, tiny_moe: Path, moe: Engine
) -> None:
    frugal = engine_for(tiny_moe, activation_checkpointing=True)
    expected = sample(moe, PROMPT, max_tokens=10, seed=1).sequences[0]
    assert (
        sample(frugal, PROMPT, max_tokens=10, seed=1).sequences[0].tokens.tolist() == expected.tokens.tolist()
    )
