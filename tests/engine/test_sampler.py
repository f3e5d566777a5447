"""Sampling: against Hugging Face token by token, alone and among others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from tests.engine import reference
from tests.engine.conftest import EngineFactory
from tests.engine.sampling import PROMPT, assert_logprobs, assert_nothing_left, dense, drain, greedy, trained
from tests.engine.ticks import (
    VOCAB_SIZE,
    forward_backward,
    make_sample,
    run,
    sample,
)
from twinkle_serve.engine.engine import Engine
from twinkle_serve.model_config import SamplerConfig
from twinkle_serve.protocol.data import Column, DatumBatch, LoraSpec


@pytest.fixture(autouse=True)
def _no_block_leaks(moe: Engine) -> Any:
    yield
    assert_nothing_left(moe)


# Against Hugging Face -------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", ["tiny_moe", "tiny_qwen3", "tiny_llama"])
def test_greedy_is_generate(model: str, request: pytest.FixtureRequest, engine_for: EngineFactory) -> None:
    directory: Path = request.getfixturevalue(model)
    engine, own = engine_for(directory), reference.load_model(directory)
    prompts = [PROMPT, [1], list(range(40, 80))]
    found = drain(
        engine,
        [make_sample(f"{i}", p, max_tokens=20, temperature=0.0) for i, p in enumerate(prompts)],
    )
    for i, prompt in enumerate(prompts):
        expected = own.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
            max_new_tokens=20,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )[0, len(prompt) :].tolist()
        (sequence,) = found[f"{i}"].sequences
        assert sequence.tokens.tolist() == expected
        assert sequence.stop_reason == "length"
        assert_logprobs(reference.plain(own), prompt, sequence)


def test_greedy_with_a_trained_adapter(moe: Engine, tiny_moe: Path) -> None:
    ref = trained(moe, 0, LoraSpec(rank=8, seed=1), "greedy")
    (sequence,) = sample(moe, PROMPT, ref, max_tokens=15, temperature=0.0).sequences
    logits = dense(moe, 0, tiny_moe).logits
    assert sequence.tokens.tolist() == greedy(logits, PROMPT, 15)
    assert sequence.tokens.tolist() != greedy(reference.plain(reference.load_model(tiny_moe)), PROMPT, 15)
    assert_logprobs(logits, PROMPT, sequence)


def test_mixed_adapters_in_one_batch_sample_their_own_weights(moe: Engine, tiny_moe: Path) -> None:
    specs = [
        LoraSpec(rank=1, seed=1),
        LoraSpec(rank=32, seed=2, train_unembed=False),
        LoraSpec(rank=5, seed=3, train_mlp=False),
    ]
    refs = [trained(moe, slot, spec, f"mixed{slot}") for slot, spec in enumerate(specs)]
    samples = [make_sample("base", PROMPT, max_tokens=12, seed=0, num_samples=2)]
    samples += [
        make_sample(f"{slot}", [slot, *PROMPT], ref, max_tokens=12, seed=slot, num_samples=3)
        for slot, ref in enumerate(refs)
    ]
    found = drain(moe, samples)
    for sequence in found["base"].sequences:
        assert_logprobs(reference.plain(reference.load_model(tiny_moe)), PROMPT, sequence)
    for slot in range(3):
        logits = dense(moe, slot, tiny_moe).logits
        for sequence in found[f"{slot}"].sequences:
            assert_logprobs(logits, [slot, *PROMPT], sequence)


def test_sampled_logprobs_are_the_trainer_s_in_any_company(moe: Engine) -> None:
    """Importance ratios start at one: for each of four trained adapters, alone and in a batch of all, at many
    lengths."""
    specs = [
        LoraSpec(rank=8, seed=4),
        LoraSpec(rank=3, seed=5, train_attn=False),
        LoraSpec(rank=32, seed=6, train_unembed=False),
        LoraSpec(rank=8, seed=7, train_mlp=False),
    ]
    refs = [trained(moe, slot, spec, f"trainer{slot}") for slot, spec in enumerate(specs)]
    rng = np.random.default_rng(1)
    samples = [
        make_sample(
            f"{slot}-{i}",
            rng.integers(0, VOCAB_SIZE, 2 + 23 * i).tolist(),
            refs[slot],
            max_tokens=6 + 5 * i,
            seed=i,
            num_samples=1 + i % 2,
        )
        for i in range(4)
        for slot in range(4)
    ]
    together = drain(moe, [*samples, make_sample("base", PROMPT, max_tokens=30, seed=0)])
    for index, request in enumerate(samples):
        name, prompt = request.request_id, request.request.prompt
        company = [together[name]] if index % 3 else [together[name], drain(moe, [request])[name]]
        for sequence in (sequence for result in company for sequence in result.sequences):
            whole = np.concatenate([prompt, sequence.tokens])
            targets = Column(whole[1:].astype(np.int64), np.zeros(1, np.int32))
            batch = DatumBatch(whole[:-1], np.array([len(whole) - 1]), {"target_tokens": targets})
            of_trainer = forward_backward(moe, int(name[0]), batch, backward=False).logprobs.values
            np.testing.assert_allclose(
                sequence.logprobs, of_trainer[len(prompt) - 1 :], atol=1e-5, rtol=0, err_msg=name
            )


def test_sampled_logprobs_are_compute_logprobs(moe: Engine) -> None:
    ref = trained(moe, 0, LoraSpec(rank=8, seed=4), "three-ways")
    (sequence,) = sample(moe, PROMPT, ref, max_tokens=24, seed=9).sequences
    whole = [*PROMPT, *sequence.tokens.tolist()]
    scored = sample(moe, whole, ref, max_tokens=1, prompt_logprobs=True).prompt_logprobs
    assert scored is not None
    np.testing.assert_allclose(scored[len(PROMPT) :], sequence.logprobs, atol=1e-5, rtol=0)


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5])
def test_logprobs_are_those_at_the_temperature(temperature: float, moe: Engine, tiny_moe: Path) -> None:
    (sequence,) = sample(
        moe, PROMPT, max_tokens=16, temperature=temperature, seed=1, top_k=20, top_p=0.9
    ).sequences
    assert_logprobs(reference.plain(reference.load_model(tiny_moe)), PROMPT, sequence, temperature)


def test_top_k_of_each_sampled_position(moe: Engine, tiny_moe: Path) -> None:
    samples = [
        make_sample("two", PROMPT, max_tokens=6, seed=1, topk_sample_logprobs=2),
        make_sample("five", PROMPT, max_tokens=4, seed=2, topk_sample_logprobs=5, num_samples=2),
        make_sample("none", PROMPT, max_tokens=6, seed=3),
    ]
    found = drain(moe, samples)
    assert found["none"].sequences[0].topk is None
    for name, k in (("two", 2), ("five", 5)):
        for sequence in found[name].sequences:
            tokens = torch.tensor([*PROMPT, *sequence.tokens.tolist()])
            with torch.no_grad():
                logprobs = torch.log_softmax(reference.load_model(tiny_moe)(tokens[None]).logits[0], -1)
            best = logprobs[len(PROMPT) - 1 : -1].topk(k)
            assert sequence.topk is not None
            np.testing.assert_array_equal(sequence.topk.token_ids, best.indices)
            np.testing.assert_allclose(sequence.topk.logprobs, best.values, atol=1e-4, rtol=0)


# Seeds ----------------------------------------------------------------------------------------------------


def test_a_seed_gives_the_same_tokens_alone_and_among_others(moe: Engine) -> None:
    ref = trained(moe, 0, LoraSpec(rank=4, seed=5), "seeds")
    mine = make_sample("mine", PROMPT, ref, max_tokens=16, seed=77, num_samples=3, top_k=9)
    alone = drain(moe, [mine])["mine"]
    rng = np.random.default_rng(0)
    others = [
        make_sample(
            f"{i}",
            rng.integers(0, VOCAB_SIZE, 1 + i).tolist(),
            ref if i % 2 else None,
            max_tokens=5 + i,
            seed=i,
            temperature=0.5 + i / 20,
            top_p=0.5 + i / 70,
        )
        for i in range(31)
    ]
    among = drain(moe, [*others[:10], mine, *others[10:]])["mine"]
    for one, other in zip(alone.sequences, among.sequences, strict=True):
        np.testing.assert_array_equal(one.tokens, other.tokens)
        np.testing.assert_allclose(one.logprobs, other.logprobs, atol=1e-5)
    texts = {tuple(sequence.tokens) for sequence in alone.sequences}
    assert len(texts) == 3


def test_without_a_seed_no_two_requests_are_alike(moe: Engine) -> None:
    found = [sample(moe, PROMPT, max_tokens=16).sequences[0].tokens.tolist() for _ in range(2)]
    assert found[0] != found[1]


def test_the_first_samples_do_not_depend_on_how_many_are_asked_for(moe: Engine) -> None:
    few = sample(moe, PROMPT, max_tokens=8, seed=3, num_samples=2).sequences
    many = sample(moe, PROMPT, max_tokens=8, seed=3, num_samples=5).sequences
    assert [s.tokens.tolist() for s in few] == [s.tokens.tolist() for s in many[:2]]


# Stopping -------------------------------------------------------------------------------------------------


def test_a_stop_id_ends_a_sample_and_is_kept(moe: Engine) -> None:
    free = sample(moe, PROMPT, max_tokens=20, seed=1).sequences[0].tokens.tolist()
    stop = free[9]
    (sequence,) = sample(moe, PROMPT, max_tokens=20, seed=1, stop_token_ids=(stop, 349)).sequences
    end = next(i for i, token in enumerate(free) if token in (stop, 349)) + 1
    assert sequence.tokens.tolist() == free[:end]
    assert len(sequence.logprobs) == end
    assert sequence.stop_reason == "stop"


def test_a_stop_string_ends_a_sample_once_the_text_contains_it(moe: Engine, tiny_moe: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_moe)
    free = sample(moe, PROMPT, max_tokens=30, seed=2).sequences[0].tokens.tolist()
    stop = next(  # plain text that spans two tokens
        text for text in (tokenizer.decode(free[i : i + 2]) for i in range(5, 28)) if text.isascii()
    )
    end = next(i for i in range(len(free) + 1) if stop in tokenizer.decode(free[:i]))
    (sequence,) = sample(moe, PROMPT, max_tokens=30, seed=2, stop_strings=("never\x00there", stop)).sequences
    assert sequence.tokens.tolist() == free[:end]
    assert sequence.stop_reason == "stop"


def test_a_token_that_stops_and_is_the_last_allowed_says_stop(moe: Engine) -> None:
    first = int(sample(moe, PROMPT, max_tokens=1, seed=1).sequences[0].tokens[0])
    result = sample(moe, PROMPT, max_tokens=1, seed=1, stop_token_ids=(first,))
    assert result.sequences[0].stop_reason == "stop"


def test_nothing_stops_without_stops(moe: Engine) -> None:
    """Not even the end-of-text token: what stops by default is the gateway's to add."""
    sequences = sample(moe, PROMPT, max_tokens=40, seed=1, temperature=5.0, num_samples=32).sequences
    assert [len(sequence.tokens) for sequence in sequences] == [40] * 32
    assert set(moe.info.eos_token_ids) & {token for s in sequences for token in s.tokens.tolist()}


def test_max_tokens_none_means_up_to_the_context_limit(engine_for: EngineFactory, tiny_moe: Path) -> None:
    engine = engine_for(tiny_moe, max_context_length=40)
    for wanted in (None, 1000):
        (sequence,) = sample(engine, PROMPT, max_tokens=wanted, seed=1).sequences
        assert (len(PROMPT) + len(sequence.tokens), sequence.stop_reason) == (40, "length")
    assert len(sample(engine, [1] * 39, max_tokens=None).sequences[0].tokens) == 1
    failure = run(engine, samples=(make_sample("s", [1] * 41),), decode_budget_s=9)["s"].failure
    assert failure is not None
    assert failure.category == "user"
    assert "40" in failure.message
    assert_nothing_left(engine)


@pytest.mark.parametrize(
    "bound", [{"max_context_length": 256}, {"sampler": SamplerConfig(kv_cache_tokens=256)}]
)
def test_an_answer_that_fills_the_context_or_the_cache_can_be_scored(
    bound: dict[str, Any], engine_for: EngineFactory, tiny_moe: Path
) -> None:
    engine = engine_for(tiny_moe, **bound)
    (sequence,) = sample(engine, PROMPT, max_tokens=None, seed=1).sequences
    whole = [*PROMPT, *sequence.tokens.tolist()]
    assert (len(whole), sequence.stop_reason) == (256, "length")
    scored = sample(engine, whole, max_tokens=1, prompt_logprobs=True)
    assert scored.prompt_logprobs is not None
    np.testing.assert_allclose(scored.prompt_logprobs[len(PROMPT) :], sequence.logprobs, atol=1e-5, rtol=0)
    assert [s.stop_reason for s in scored.sequences] == ["length"]
    assert_nothing_left(engine)
