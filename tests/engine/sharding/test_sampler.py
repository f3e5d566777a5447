"""Two ranks sample what one does: the same tokens, whichever rank decodes a request, whoever is beside it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tests.engine.conftest import EngineFactory
from tests.engine.sharding import remote
from tests.engine.sharding.compare import Both, passes
from tests.engine.sharding.conftest import BothFactory
from tests.engine.sharding.test_saving import on_crew
from tests.engine.sharding.test_training import SPECS, ways, work
from tests.engine.ticks import make_sample, value
from twinkle_serve.engine.sampler import _TELL_EVERY_S
from twinkle_serve.model_config import SamplerConfig
from twinkle_serve.protocol.data import LoraSpec
from twinkle_serve.protocol.work import (
    AdapterRef,
    Outcome,
    Progress,
    Sample,
    SaveAdapter,
    Snapshot,
    Tick,
    TickReport,
)


def snapshots(pair: Both) -> list[AdapterRef | None]:
    """Three tenants' adapters, and the base model alone."""
    pair.create(SPECS)
    pair.run(snapshots=tuple(Snapshot(f"s{i}", i, f"snap{i}") for i in range(len(SPECS))))
    return [None, *(AdapterRef(f"snap{i}") for i in range(len(SPECS)))]


def requests(refs: list[AdapterRef | None], count: int) -> tuple[Sample, ...]:
    """Together they ask all that can be asked."""
    return tuple(request(i, refs[i % len(refs)]) for i in range(count))


def request(i: int, ref: AdapterRef | None) -> Sample:
    prompt = [i + 1, 2, 3 + i, *range(20, 20 + 5 * (i % 4))]
    targets = np.array([[(7 * place + i) % 300, -1] for place in range(1, len(prompt))], np.int64)
    return make_sample(
        f"x{i}",
        prompt,
        ref,
        max_tokens=3 + 2 * i,
        seed=i,
        num_samples=1 + i % 3,
        topk_sample_logprobs=2 * (i % 2),
        prompt_logprobs=i % 2 == 0,
        topk_prompt_logprobs=3 * (i % 2),
        target_prompt_tokens=targets if i % 2 == 0 else None,
        prompt_alt_tokens_k=2 * (i % 2),
        temperature=[1.0, 0.0, 0.7][i % 3],
    )


@ways
def test_mixed_adapters_give_the_same_tokens(both: BothFactory, sharding: str) -> None:
    pair = both(sharding)
    pair.run(samples=requests(snapshots(pair), 9), decode_budget_s=120.0)


@ways
def test_in_deterministic_mode_samples_are_bitwise_those_drawn_alone(
    both: BothFactory, sharding: str
) -> None:
    pair = both(sharding, deterministic=True, sampler=SamplerConfig(prefill_chunk_tokens=16))
    asks = requests(snapshots(pair), 7)
    together = bits(pair.run(samples=asks, decode_budget_s=120.0))
    for ask in asks:
        alone = bits(on_crew(pair, samples=(ask,), decode_budget_s=120.0))
        assert alone == {ask.request_id: together[ask.request_id]}


def bits(outcomes: dict[str, Outcome]) -> dict[str, list[tuple[list[int], bytes]]]:
    """Of each sample the tokens, and their logprobs to the last bit."""
    return {
        name: [(s.tokens.tolist(), np.asarray(s.logprobs).tobytes()) for s in outcome.value.sequences]
        for name, outcome in outcomes.items()
    }


def test_training_goes_on_beside_samples(both: BothFactory) -> None:
    """A few steps of decoding in each tick: the snapshots stay what they were."""
    pair = both("expert_parallel")
    samples = requests(snapshots(pair), 5)
    found: dict[str, Outcome] = {}
    ticks = [Tick(1, samples=samples, decode_budget_s=1e-9)] + [Tick(2, decode_budget_s=1e-9)] * 60
    fields = passes(work(1, [[9, 2], [5, 4], [7]]))
    ticks[2:4] = [Tick(3, decode_budget_s=1e-9, **fields)] * 2
    report = None
    for tick in ticks:
        items, _ = pair.crew.run(remote.run_tick, pair.config, tick)
        found |= {item.request_id: item for item in items if isinstance(item, Outcome)}
        report = items[-1]
    assert isinstance(report, TickReport)
    assert report.active_samples == 0
    alone = {
        o.request_id: o
        for o in pair.one.run(Tick(1, samples=samples, decode_budget_s=60.0))
        if isinstance(o, Outcome)
    }
    for name, outcome in alone.items():
        for mine, its in zip(found[name].value.sequences, outcome.value.sequences, strict=True):
            assert mine.tokens.tolist() == its.tokens.tolist()


def test_a_cache_that_is_too_small_for_all_pauses_some(both: BothFactory) -> None:
    pair = both("expert_parallel", sampler=SamplerConfig(kv_cache_tokens=256, max_batch=6, adapter_slots=2))
    samples = tuple(
        make_sample(f"x{i}", list(range(30 + i)), ref, max_tokens=40, seed=i, num_samples=2)
        for i, ref in enumerate(snapshots(pair) * 2)
    )
    pair.run(samples=samples, decode_budget_s=120.0)
    report = pair.crew.run(remote.run_tick, pair.config, Tick(1))[0][-1]
    assert report.gauges["kv_blocks_free"] == report.gauges["kv_blocks"]


def test_one_tenant_s_many_samples_keep_no_other_s_from_beginning(both: BothFactory) -> None:
    """On both ranks: each one's part of the cache is full of them, as is the batch."""
    config = SamplerConfig(kv_cache_tokens=512, max_batch=4, prefill_chunk_tokens=32)
    pair = both("expert_parallel", sampler=config)
    many = tuple(
        make_sample(f"m{i}", [1, i], max_tokens=120, seed=i, num_samples=6, top_k=5) for i in range(2)
    )
    on_crew(pair, samples=many, decode_budget_s=1e-9)
    for _ in range(40):
        assert on_crew(pair, decode_budget_s=1e-9) == {}
    few = tuple(
        replace(make_sample(f"f{i}", list(range(i, 100)), max_tokens=3, seed=i, top_k=5), tenant="other")
        for i in range(3)
    )
    found = on_crew(pair, samples=few, decode_budget_s=1e-9)
    for _ in range(70):  # the second one of a rank begins when the others were served as much as the first
        found |= on_crew(pair, decode_budget_s=1e-9)
    assert set(found) == {"f0", "f1", "f2"}
    found |= on_crew(pair, decode_budget_s=120.0)
    alone = {
        o.request_id: o
        for o in pair.one.run(Tick(1, samples=(*many, *few), decode_budget_s=120.0))
        if isinstance(o, Outcome)
    }
    for name, outcome in alone.items():
        for mine, its in zip(found[name].value.sequences, outcome.value.sequences, strict=True):
            assert mine.tokens.tolist() == its.tokens.tolist()
    report = pair.crew.run(remote.run_tick, pair.config, Tick(1))[0][-1]
    assert report.gauges["kv_blocks_free"] == report.gauges["kv_blocks"]


@pytest.mark.parametrize(("first", "second"), [((200, 400), (100, 20)), ((120, 400), (100, 60))])
def test_a_sample_that_fills_its_rank_s_cache_ends_alone(
    both: BothFactory, engine_for: EngineFactory, moe8: Path, first: tuple[int, int], second: tuple[int, int]
) -> None:
    """Who waits for its blocks goes on as in one engine with as large a cache, fresh or paused before.

    first, second: the tokens of a prompt and of its answer. Both are on the first rank.
    """
    pair = both("expert_parallel", sampler=SamplerConfig(kv_cache_tokens=512))
    pair.one = engine_for(moe8, sampler=SamplerConfig(kv_cache_tokens=256))
    wide = make_sample("wide", [1, 2], max_tokens=2, seed=1, num_samples=2)
    one, other = (
        make_sample(name, [start, *range(length - 1)], max_tokens=count, seed=2, top_k=5)
        for start, name, (length, count) in ((7, "first", first), (8, "second", second))
    )
    found = pair.run(samples=(one, wide, other), decode_budget_s=120.0)
    ends = {name: value(found[name]).sequences[0] for name in ("first", "second")}
    assert first[0] + len(ends["first"].tokens) == 256
    assert len(ends["second"].tokens) == second[1]
    report = pair.crew.run(remote.run_tick, pair.config, Tick(1))[0][-1]
    assert report.gauges["kv_blocks_free"] == report.gauges["kv_blocks"]


def test_more_adapters_than_the_pool_holds_wait(both: BothFactory) -> None:
    pair = both("expert_parallel", max_rank=8, sampler=SamplerConfig(adapter_slots=1))
    specs = [LoraSpec(8, seed) for seed in range(3)]
    pair.create(specs)
    pair.run(snapshots=tuple(Snapshot(f"s{i}", i, f"full{i}") for i in range(3)))
    samples = tuple(
        make_sample(f"x{i}", [1, 2, i], AdapterRef(f"full{i % 3}"), max_tokens=4 + i, seed=i)
        for i in range(7)
    )
    pair.run(samples=samples, decode_budget_s=120.0)


def test_a_cancelled_sample_leaves_nothing_behind(both: BothFactory) -> None:
    pair = both("expert_parallel")
    refs = snapshots(pair)
    on_crew(pair, samples=requests(refs, 4), decode_budget_s=1e-9)
    on_crew(pair, cancels=("x0", "x1", "x2", "x3", "never"), decode_budget_s=1e-9)
    report = pair.crew.run(remote.run_tick, pair.config, Tick(1, drop_snapshots=("snap0",)))[0][-1]
    assert report.active_samples == 0
    assert report.gauges["kv_blocks_free"] == report.gauges["kv_blocks"]
    pair.run(samples=requests(refs, 1), decode_budget_s=60.0)


def test_what_cannot_be_sampled_is_refused(both: BothFactory) -> None:
    pair = both("expert_parallel")
    samples = (
        make_sample("gone", [1], AdapterRef("never"), max_tokens=3),
        make_sample("lost", [1], AdapterRef("dir", "/nowhere"), max_tokens=3),
        make_sample("long", list(range(300)) * 20, max_tokens=3),
        make_sample("fine", [1, 2], max_tokens=3, seed=1),
    )
    pair.run(samples=samples, decode_budget_s=60.0)


def test_weights_that_diverged_on_one_rank_are_refused_by_all(both: BothFactory) -> None:
    pair = both("expert_parallel")
    pair.create(SPECS[:2])
    pair.crew.run(remote.spoil, pair.config, 0)
    pair.one.pool.blocks(0)[0][0, 0] = float("nan")
    pair.run(snapshots=(Snapshot("s0", 0, "diverged"), Snapshot("s1", 1, "fine")))
    refs = [AdapterRef("diverged"), AdapterRef("fine")]
    for _ in range(2):
        samples = tuple(make_sample(f"x{i}", [1, 2, i], refs[i % 2], max_tokens=4, seed=i) for i in range(4))
        found = pair.run(samples=samples, decode_budget_s=60.0)
        assert [found[f"x{i}"].failure is None for i in range(4)] == [False, True, False, True]


def test_a_refusal_on_one_rank_leaves_both_pools_alike(both: BothFactory, tmp_path: Path) -> None:
    """The pool has one place. Who keeps an adapter that its peer gave up would not read it with it again."""
    pair = both("expert_parallel", max_rank=8, sampler=SamplerConfig(adapter_slots=1))
    pair.create([LoraSpec(8, 0), LoraSpec(8, 1)])
    on_crew(pair, saves=(SaveAdapter("save", 1, str(tmp_path / "fine"), False, {}),))
    pair.crew.run(remote.spoil, pair.config, 0)
    pair.one.pool.blocks(0)[0][0, 0] = float("nan")
    pair.run(snapshots=(Snapshot("s0", 0, "spoilt"),))
    refs = [AdapterRef("fine", str(tmp_path / "fine")), AdapterRef("spoilt")]
    for turn in (0, 1, 0):
        sample = make_sample("x", [1, 2], refs[turn], max_tokens=4, seed=1)
        found = pair.run(samples=(sample,), decode_budget_s=60.0)
        assert (found["x"].failure is None) == (turn == 0)


def test_an_adapter_that_one_rank_cannot_place_is_placed_by_none(both: BothFactory) -> None:
    pair = both("expert_parallel", max_rank=8, sampler=SamplerConfig(adapter_slots=1))
    pair.create([LoraSpec(8, 0), LoraSpec(8, 1)])
    pair.run(snapshots=(Snapshot("s0", 0, "one"), Snapshot("s1", 1, "other")))
    samples = [make_sample(name, [1, 2], AdapterRef(name), max_tokens=4, seed=1) for name in ("one", "other")]
    pair.crew.run(remote.fail_in_put, pair.config, 1)
    failure = on_crew(pair, samples=samples[:1], decode_budget_s=60.0)["one"].failure
    assert failure is not None
    assert failure.category == "server"
    for turn in (0, 1, 0):
        pair.run(samples=(samples[turn],), decode_budget_s=60.0)


@ways
def test_from_a_checkpoint_on_disk(both: BothFactory, sharding: str, tmp_path: Path) -> None:
    pair = both(sharding)
    pair.create(SPECS)
    saves = tuple(SaveAdapter(f"s{i}", i, str(tmp_path / f"{i}"), False, {}) for i in range(len(SPECS)))
    on_crew(pair, saves=saves)
    refs: list[AdapterRef | None] = [
        AdapterRef(f"disk{sharding}{i}", str(tmp_path / f"{i}")) for i in range(3)
    ]
    pair.run(samples=requests(refs, 4), decode_budget_s=60.0)


def test_a_stream_tells_all_of_it(both: BothFactory) -> None:
    pair = both("expert_parallel")
    samples = [make_sample(f"x{i}", [1, i], max_tokens=30, seed=i) for i in range(2)]
    streamed = tuple(Sample(s.request_id, s.tenant, s.adapter, s.request, stream=True) for s in samples)
    pair.crew.run(remote.tell_every, 0.0)
    items = pair.crew.run(remote.run_tick, pair.config, Tick(1, samples=streamed, decode_budget_s=60.0))[0]
    pair.crew.run(remote.tell_every, _TELL_EVERY_S)
    told = [item for item in items if isinstance(item, Progress)]
    answers = {item.request_id: value(item) for item in items if isinstance(item, Outcome)}
    assert answers.keys() == {"x0", "x1"}
    for name, answer in answers.items():
        deltas = [delta for item in told if item.request_id == name for delta in item.deltas]
        (sequence,) = answer.sequences
        tokens = np.concatenate([delta.tokens for delta in deltas])
        assert 0 <= len(sequence.tokens) - len(tokens) <= 1
        assert tokens.tolist() == sequence.tokens[: len(tokens)].tolist()
        logprobs = np.concatenate([delta.logprobs for delta in deltas])
        np.testing.assert_array_equal(logprobs, sequence.logprobs[: len(tokens)])


def test_an_error_on_one_rank_ends_only_its_own_requests(both: BothFactory) -> None:
    pair = both("expert_parallel")
    samples = tuple(make_sample(f"x{i}", [1, 2, i], max_tokens=6, seed=i) for i in range(2))
    pair.crew.run(remote.fail_once, pair.config, 1, 1, RuntimeError("planted"), "forward")
    found = on_crew(pair, samples=samples, decode_budget_s=60.0)
    failed = [name for name, outcome in found.items() if outcome.failure is not None]
    assert len(failed) == 1
    pair.run(samples=samples, decode_budget_s=60.0)


@pytest.mark.parametrize("budget", [0.0, -1.0])
def test_without_a_budget_nothing_is_decoded(both: BothFactory, budget: float) -> None:
    pair = both("expert_parallel")
    samples = (make_sample("x", [1, 2], max_tokens=3, seed=1),)
    assert pair.run(samples=samples, decode_budget_s=budget) == {}
    assert set(pair.run(decode_budget_s=60.0)) == {"x"}
