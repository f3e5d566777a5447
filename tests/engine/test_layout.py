"""The layout of a block: alignment, no overlap, the published parameter counts, and views that alias."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from twinkle_serve.engine.layout import ALIGNMENT, AdapterLayout, Target


def _targets() -> st.SearchStrategy[list[Target]]:
    size = st.integers(1, 40)
    linear = st.builds(lambda i, o: ("linear", i, o, 0), size, size)
    kinds = st.sampled_from(["expert_gate", "expert_up", "expert_down"])
    expert = st.builds(lambda k, i, o, e: (k, i, o, e), kinds, size, size, st.integers(1, 5))
    shapes = st.lists(linear | expert, min_size=1, max_size=12)
    return shapes.map(
        lambda rows: [Target(k, f"m.{n}", "mlp", i, o, e) for n, (k, i, o, e) in enumerate(rows)]
    )


@given(_targets(), st.integers(1, 4))
def test_views_are_aligned_disjoint_and_alias_the_block(targets: list[Target], rank: int) -> None:
    layout = AdapterLayout.build(targets)
    assert layout.row_size % ALIGNMENT == 0
    block = torch.zeros(rank, layout.row_size)
    for target in layout.targets:
        for offset, view in (
            (target.a_offset, layout.a(block, target)),
            (target.b_offset, layout.b_t(block, target)),
        ):
            assert offset % ALIGNMENT == 0
            view += 1
    assert block.max() == 1, "two views overlap"
    assert block.sum() == layout.num_parameters(rank)


def test_widths_follow_the_shared_outer_scheme() -> None:
    gate = Target("expert_gate", "m.experts", "mlp", in_features=8, out_features=3, num_experts=4)
    down = Target("expert_down", "m.experts", "mlp", in_features=3, out_features=8, num_experts=4)
    assert (gate.a_width, gate.b_width) == (8, 12)
    assert (down.a_width, down.b_width) == (12, 8)


def test_views_of_a_pool_keep_its_leading_dimensions() -> None:
    layout = AdapterLayout.build([Target("linear", "lm_head", "unembed", 6, 10)])
    pool = torch.zeros(3, 4, layout.row_size)
    target = layout.targets[0]
    assert layout.a(pool, target).shape == (3, 4, 6)
    layout.b_t(pool, target)[1] = 1.0
    assert pool[1].sum() == 40
    assert pool.sum() == 40


def test_parameter_counts_of_qwen3_30b_a3b_are_those_tinker_publishes() -> None:
    hidden, inner, experts, heads, kv_heads, head_dim = 2048, 768, 128, 32, 4, 128
    targets = []
    for i in range(48):
        attention = f"model.layers.{i}.self_attn"
        for name, fan_in, fan_out in (
            ("q_proj", hidden, heads * head_dim),
            ("k_proj", hidden, kv_heads * head_dim),
            ("v_proj", hidden, kv_heads * head_dim),
            ("o_proj", heads * head_dim, hidden),
        ):
            targets.append(Target("linear", f"{attention}.{name}", "attn", fan_in, fan_out))
        path = f"model.layers.{i}.mlp.experts"
        targets.append(Target("expert_gate", path, "mlp", hidden, inner, experts))
        targets.append(Target("expert_up", path, "mlp", hidden, inner, experts))
        targets.append(Target("expert_down", path, "mlp", inner, hidden, experts))
    targets.append(Target("linear", "lm_head", "unembed", hidden, 151_936))
    layout = AdapterLayout.build(targets)
    assert layout.num_parameters(1, ("mlp",)) == 14_450_688
    assert layout.num_parameters(1, ("attn",)) == 835_584
    assert layout.num_parameters(1, ("unembed",)) == 153_984


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        ([Target("linear", "m", "mlp", 1, 1), Target("linear", "m", "mlp", 1, 1)], "twice"),
        ([Target("linear", "m", "mlp", 0, 1)], "features must be >= 1"),
        ([Target("linear", "m", "mlp", 1, 1, num_experts=2)], "kind linear with 2 experts"),
        ([Target("expert_up", "m", "mlp", 1, 1)], "kind expert_up with 0 experts"),
    ],
)
def test_a_layout_that_makes_no_sense_is_refused(targets: list[Target], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AdapterLayout.build(targets)
