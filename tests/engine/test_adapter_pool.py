"""The pool of adapters: who lies where, and one product for many against one product each."""

from __future__ import annotations

import pytest
import torch

from twinkle_serve.engine import adapter_pool
from twinkle_serve.engine.adapter_pool import AdapterPool, Pooled, PoolFull
from twinkle_serve.engine.layout import AdapterLayout, Target
from twinkle_serve.engine.slots import AdapterState
from twinkle_serve.protocol.data import LoraSpec

IN, OUT = 24, 40
LAYOUT = AdapterLayout.build(
    [Target("linear", "one", "attn", IN, OUT), Target("expert_up", "many", "mlp", IN, OUT, num_experts=3)]
)


def state(rank: int, seed: int = 0, size: float = 0.1) -> AdapterState:
    generator = torch.Generator().manual_seed(seed)
    return AdapterState(LoraSpec(rank), torch.randn(rank, LAYOUT.row_size, generator=generator) * size)


def pool(num_rows: int = 64, dtype: torch.dtype = torch.float32) -> AdapterPool:
    return AdapterPool(LAYOUT, num_rows, torch.device("cpu"), dtype)


def product(pooled: Pooled | None, x: torch.Tensor) -> torch.Tensor:
    """What one adapter alone adds to one row of the first target."""
    if pooled is None:
        return torch.zeros(OUT)
    factors = pooled.adapter.factors(0)
    return pooled.adapter.scale * (x @ factors.a_t) @ factors.b_t


def added(store: AdapterPool, rows: list[tuple[Pooled | None, int]], x: torch.Tensor) -> torch.Tensor:
    out = torch.zeros(x.shape[0], OUT)
    for block in store.blocks(rows, IN):
        block.add(out, x, *block.views.linear(0))
    return out


def test_adapters_fill_the_first_gap_that_holds_them() -> None:
    store = pool(12)
    first, second, third = (store.put(state(rank)) for rank in (4, 3, 5))
    assert [p.first for p in (first, second, third)] == [0, 4, 7]
    with pytest.raises(PoolFull):
        store.put(state(1))
    store.remove(second)
    with pytest.raises(PoolFull):
        store.put(state(4))
    assert store.put(state(2)).first == 4
    assert store.put(state(1)).first == 6


def test_an_adapter_shows_the_weights_it_was_put_with() -> None:
    store = pool()
    store.put(state(5, seed=1))
    source = state(7, seed=2)
    pooled = store.put(source)
    torch.testing.assert_close(pooled.adapter.weights, source.weights)
    for target in (0, 1):
        views = store.views(pooled.first, pooled.end)
        factors = pooled.adapter.factors(target)
        torch.testing.assert_close(torch.cat([a.t() for a in views.a_t(target)], 1), factors.a)
        torch.testing.assert_close(torch.cat(views.b(target), 1), factors.b_t)


def test_the_unembedding_s_factors_stay_float32_beside_a_copy_in_the_model_s_type() -> None:
    store = pool(dtype=torch.bfloat16)
    source = state(6, seed=3)
    pooled = store.put(source)
    a_t, b = store.views(pooled.first, pooled.end).head(0)
    torch.testing.assert_close(a_t.t(), LAYOUT.a(source.weights, LAYOUT.targets[0]))
    torch.testing.assert_close(b, LAYOUT.b_t(source.weights, LAYOUT.targets[0]))
    assert store.views(pooled.first, pooled.end).linear(0)[0].dtype == torch.bfloat16


@pytest.mark.parametrize("merge", [0, 2**19], ids=["apart", "together"])
def test_every_row_gets_its_own_adapter_s_product(merge: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adapter_pool, "_MERGE_PRODUCTS", merge)
    store = pool()
    adapters = [store.put(state(rank, seed=rank)) for rank in (4, 8, 8, 1, 16)]
    store.remove(adapters.pop(1))  # a gap with an old adapter's numbers in it
    rows: list[tuple[Pooled | None, int]] = [
        (None, 2),
        *((p, n) for p, n in zip(adapters, (1, 3, 2, 1), strict=True)),
    ]
    owners = [pooled for pooled, count in rows for _ in range(count)]
    x = torch.randn(len(owners), IN, generator=torch.Generator().manual_seed(0))
    expected = torch.stack([product(owner, row) for owner, row in zip(owners, x, strict=True)])
    torch.testing.assert_close(added(store, rows, x), expected, atol=1e-6, rtol=1e-5)
    assert len(store.blocks(rows, IN)) == (1 if merge else 4)


def test_equal_scales_need_no_product_of_their_own() -> None:
    store = pool()
    adapters = [store.put(state(8, seed=seed)) for seed in range(3)]
    (block,) = store.blocks([(p, 1) for p in adapters], IN)
    assert block.scales is None
    assert block.scale == adapters[0].adapter.scale
    x = torch.randn(3, IN)
    expected = torch.stack([product(p, row) for p, row in zip(adapters, x, strict=True)])
    torch.testing.assert_close(added(store, [(p, 1) for p in adapters], x), expected, atol=1e-6, rtol=1e-5)


def test_an_adapter_that_overflows_disturbs_no_other_row() -> None:
    store = pool()
    good, huge = store.put(state(8, seed=1)), store.put(state(8, seed=2, size=5e37))
    x = torch.randn(2, IN, generator=torch.Generator().manual_seed(0)) * 100
    rows: list[tuple[Pooled | None, int]] = [(good, 1), (huge, 1)]
    assert len(store.blocks(rows, IN)) == 1
    out = added(store, rows, x)
    assert not torch.isfinite(out[1]).all()
    torch.testing.assert_close(out[0], product(good, x[0]), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_never_enter(bad: float) -> None:
    store = pool()
    broken = state(4)
    broken.weights[2, 5] = bad
    with pytest.raises(ValueError, match="diverged"):
        store.check(broken)
    assert store.put(state(64)).first == 0


def test_an_adapter_larger_than_the_pool_is_refused() -> None:
    with pytest.raises(ValueError, match=r"rank 9; 8 "):
        pool(8).check(state(9))


@pytest.mark.parametrize(("device", "taken"), [("cpu", False), ("meta", True)])
def test_a_device_s_memory_is_taken_before_training_fills_it(device: str, taken: bool) -> None:
    made = vars(AdapterPool(LAYOUT, 8, torch.device(device), torch.bfloat16))
    assert [name in made for name in ("_weights", "_compute")] == [taken, taken]


def test_large_batches_are_not_merged() -> None:
    store = pool()
    adapters = [store.put(state(8, seed=seed)) for seed in range(2)]
    rows = 2**19 // (16 * IN) + 1
    assert len(store.blocks([(adapters[0], rows), (adapters[1], 1)], IN)) == 2
    assert len(store.blocks([(adapters[0], rows // 2), (adapters[1], 1)], IN)) == 1
