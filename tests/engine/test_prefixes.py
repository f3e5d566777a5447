"""Prefix reuse: what is found again, by whom, and that nobody's numbers change."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from tests.engine.ticks import VOCAB_SIZE, make_sample, run, value
from twinkle_serve.engine.engine import Engine
from twinkle_serve.engine.kv_cache import BLOCK_TOKENS, DecodeAttend, KVCache, Rows
from twinkle_serve.engine.prefixes import remember, reuse
from twinkle_serve.protocol.data import SampleResult

TOKENS = list(range(100))


def cache(num_blocks: int = 8) -> KVCache:
    return KVCache(1, num_blocks * BLOCK_TOKENS, 1, 4, torch.float32, torch.device("cpu"))


def filled(store: KVCache, tokens: list[int], owner: str = "me") -> Rows:
    rows = Rows()
    store.grow(rows, len(tokens))
    rows.length = len(tokens)
    remember(store, owner, tokens, rows)
    return rows


def test_finds_whole_blocks_of_the_same_beginning() -> None:
    store = cache()
    first = filled(store, TOKENS[:40])
    again = reuse(store, "me", TOKENS[:40], 39)
    assert again.blocks == first.blocks[:2]
    assert again.length == 2 * BLOCK_TOKENS
    assert reuse(store, "me", TOKENS[:40], 31).length == BLOCK_TOKENS
    assert reuse(store, "me", [7, *TOKENS[1:40]], 39).length == 0
    assert reuse(store, "you", TOKENS[:40], 39).length == 0


def test_a_kept_block_counts_as_free_and_is_given_away_last_used_first() -> None:
    store = cache(4)
    old, new = filled(store, TOKENS[:32]), filled(store, TOKENS[50:82])
    store.release(old)
    store.release(new)
    assert store.num_free == 4
    other = Rows()
    store.grow(other, 2 * BLOCK_TOKENS)
    assert reuse(store, "me", TOKENS[:32], 32).length == 0
    assert reuse(store, "me", TOKENS[50:82], 32).length == 2 * BLOCK_TOKENS


def test_a_shared_block_outlives_its_first_owner() -> None:
    store = cache(4)
    first = filled(store, TOKENS[:32])
    second = reuse(store, "me", TOKENS[:32], 32)
    store.release(first)
    assert store.num_free == 2
    store.release(second)
    assert store.num_free == 4


def test_padding_never_reads_what_another_sequence_stored() -> None:
    store = cache(4)
    diverged, sane = Rows(), Rows()
    store.grow(diverged, 16)
    store.grow(sane, 3)
    longer = Rows()
    store.grow(longer, 5)
    store.keys[0].fill_(1.0)
    store.values[0].fill_(1.0)
    store.keys[0][:16] = torch.nan
    store.values[0][:16] = torch.nan
    sane.length, longer.length = 2, 4
    attend = DecodeAttend(store, [sane, longer])
    q, k = torch.ones(1, 1, 2, 4), torch.ones(1, 1, 2, 4)
    assert torch.isfinite(attend(0, q, k, k, None, None)).all()


def ask(engine: Engine, name: str, prompt: list[int], tenant: str = "a", **fields: object) -> SampleResult:
    sample = replace(make_sample(name, prompt, max_tokens=12, seed=5, **fields), tenant=tenant)
    result = value(run(engine, samples=(sample,), decode_budget_s=60.0)[name])
    assert isinstance(result, SampleResult)
    return result


def test_a_tenant_reuses_its_prompt_and_gets_the_same_tokens(moe: Engine) -> None:
    prompt = np.random.default_rng(3).integers(0, VOCAB_SIZE, 50).tolist()
    first = ask(moe, "first", prompt)
    assert first.prompt_cache_hit_tokens == 0
    second = ask(moe, "second", prompt)
    assert second.prompt_cache_hit_tokens == 48
    stranger = ask(moe, "stranger", prompt, tenant="b")
    assert stranger.prompt_cache_hit_tokens == 0
    for result in (second, stranger):
        assert result.sequences[0].tokens.tolist() == first.sequences[0].tokens.tolist()
        assert result.sequences[0].logprobs == pytest.approx(first.sequences[0].logprobs, abs=1e-5)


def test_the_next_turn_of_a_conversation_reuses_the_answer_too(moe: Engine) -> None:
    prompt = np.random.default_rng(4).integers(0, VOCAB_SIZE, 30).tolist()
    first = ask(moe, "first", prompt)
    longer = [*prompt, *first.sequences[0].tokens.tolist(), 1, 2, 3, 4, 5, 6, 7, 8]
    assert ask(moe, "second", longer).prompt_cache_hit_tokens == 32


def test_scored_prompt_tokens_are_computed_afresh(moe: Engine) -> None:
    prompt = np.random.default_rng(5).integers(0, VOCAB_SIZE, 60).tolist()
    ask(moe, "first", prompt)
    whole = ask(moe, "whole", prompt, prompt_logprobs=True)
    assert whole.prompt_cache_hit_tokens == 0
    last = ask(moe, "last", prompt, prompt_logprobs=True, prompt_logprobs_last_n=10)
    assert last.prompt_cache_hit_tokens == 48
    assert whole.prompt_logprobs is not None
    assert last.prompt_logprobs is not None
    assert np.isnan(last.prompt_logprobs[:50]).all()
    assert last.prompt_logprobs[50:] == pytest.approx(whole.prompt_logprobs[50:], abs=1e-5)
