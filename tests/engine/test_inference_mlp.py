"""Pairs of tokens and experts in order."""

from __future__ import annotations

import numpy as np
import torch

from tests.engine.test_adapter_pool import pool, state
from twinkle_serve.engine.inference_mlp import _sort


def test_pairs_come_by_expert_and_then_by_token_and_each_block_knows_its_own() -> None:
    rng = np.random.default_rng(0)
    num_tokens, top_k, num_experts = 13, 3, 6
    chosen = torch.from_numpy(np.stack([rng.permutation(num_experts)[:top_k] for _ in range(num_tokens)]))
    store = pool(64)
    adapters = [store.put(state(8, seed=seed)) for seed in range(2)]
    blocks = [
        block for p, n in zip(adapters, (4, 6), strict=True) for block in store.blocks([(None, 0), (p, n)], 8)
    ]
    whole = store.blocks([(adapters[0], num_tokens)], 8)
    middle = store.blocks([(None, 3), (adapters[1], 6)], 8)
    pairs = _sort(chosen, num_experts, [*whole, *middle])
    experts = np.repeat([e for e, _ in pairs.parts], [n for _, n in pairs.parts])
    tokens = pairs.token.numpy()
    assert sorted(zip(tokens.tolist(), experts.tolist(), strict=True)) == sorted(
        (t, e) for t, row in enumerate(chosen.tolist()) for e in row
    )
    keys = experts * num_tokens + tokens
    assert (np.diff(keys) > 0).all()
    assert tokens[pairs.place.numpy()].tolist() == np.repeat(np.arange(num_tokens), top_k).tolist()
    assert experts[pairs.place.numpy()].reshape(num_tokens, top_k).tolist() == chosen.tolist()
    for (start, end), cuts in zip([(0, num_tokens), (3, 9)], pairs.cuts, strict=True):
        covered = [i for number, a, b in cuts for i in range(a, b)]
        assert covered == [i for i, token in enumerate(tokens) if start <= token < end]
        for number, a, b in cuts:
            assert set(experts[a:b]) == {pairs.parts[number][0]}
    assert len(blocks) == 2
