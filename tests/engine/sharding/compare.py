"""One rank and several doing the same: every answer and everything in the slots must agree."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch

from tests.engine.sharding import remote
from tests.engine.ticks import make_pass
from twinkle_serve.config import ModelConfig
from twinkle_serve.control.microbatches import Load, pack
from twinkle_serve.engine.engine import Engine
from twinkle_serve.engine.slots import AdapterState
from twinkle_serve.protocol.data import DatumBatch, ForwardResult, LoraSpec, SampleResult, TopK
from twinkle_serve.protocol.work import CreateAdapter, Outcome, Pass, Tick, TickReport
from twinkle_serve.testing.crew import Crew

RELATIVE = 1e-5


@dataclass
class Both:
    """``one`` rank in this process, and several that share the model."""

    one: Engine
    crew: Crew
    config: ModelConfig

    def run(self, **fields: Any) -> dict[str, Outcome]:
        """One tick on both sides; the outcomes, which are the same, are those of the several."""
        tick = Tick(1, **fields)
        expected = list(self.one.run(tick))
        first, *others = self.crew.run(remote.run_tick, self.config, tick)
        assert all(items == [] for items in others), "only the first rank speaks"
        assert_items(first, expected)
        return {item.request_id: item for item in first if isinstance(item, Outcome)}

    def create(self, specs: Sequence[LoraSpec]) -> None:
        """Runs in slots 0, 1, ... with every factor random."""
        self.run(creates=tuple(CreateAdapter(f"c{i}", f"run{i}", i, spec) for i, spec in enumerate(specs)))
        for slot in range(len(specs)):
            remote.move(self.one, slot, slot)
            self.crew.run(remote.disturb, self.config, slot, slot)

    def state(self, slot: int) -> AdapterState:
        """The whole of what the several ranks have in a slot."""
        state, *others = self.crew.run(remote.whole_state, self.config, slot)
        assert others == [None] * len(others)
        return state  # type: ignore[no-any-return]

    def assert_same_slots(self, slots: Sequence[int]) -> None:
        for slot in slots:
            assert_same_state(self.state(slot), self.one.pool.state(slot))


def assert_items(found: Sequence[Any], expected: Sequence[Any]) -> None:
    outcomes, others = ([i for i in items if isinstance(i, Outcome)] for items in (found, expected))
    assert sorted(o.request_id for o in outcomes) == sorted(o.request_id for o in others)
    by_id = {outcome.request_id: outcome for outcome in others}
    for outcome in outcomes:
        other = by_id[outcome.request_id]
        assert (outcome.failure is None) == (other.failure is None)
        if outcome.failure is not None and other.failure is not None:
            # The several know better which datums it was among.
            assert outcome.failure.category == other.failure.category
            assert outcome.failure.message.split("(among")[0] == other.failure.message.split("(among")[0]
        assert_same_value(outcome.value, other.value)
    assert isinstance(found[-1], TickReport)
    assert isinstance(expected[-1], TickReport)
    assert found[-1].active_samples == expected[-1].active_samples


def assert_same_value(one: object, other: object) -> None:
    if isinstance(one, ForwardResult):
        assert isinstance(other, ForwardResult)
        assert_close(one.logprobs.values, other.logprobs.values)
        assert one.metrics == pytest.approx(dict(other.metrics), rel=RELATIVE, abs=1e-4)
    elif isinstance(one, SampleResult):
        assert isinstance(other, SampleResult)
        assert_same_sample(one, other)
    elif isinstance(one, dict):
        assert one == pytest.approx(other, rel=RELATIVE)
    elif not isinstance(one, int):  # the size of a checkpoint: JSON has more or fewer digits
        assert one == other


def assert_same_sample(one: SampleResult, other: SampleResult) -> None:
    for mine, its in zip(one.sequences, other.sequences, strict=True):
        assert mine.tokens.tolist() == its.tokens.tolist()
        assert mine.stop_reason == its.stop_reason
        assert_close(mine.logprobs, its.logprobs)
        assert_same_topk(mine.topk, its.topk)
    for name in ("prompt_logprobs", "target_prompt_logprobs"):
        a, b = getattr(one, name), getattr(other, name)
        assert (a is None) == (b is None), name
        if a is not None:
            assert_close(a, b)  # that of the first token is NaN in both
    assert_same_topk(one.topk_prompt, other.topk_prompt)
    assert_same_topk(one.prompt_alternatives, other.prompt_alternatives)


def assert_same_topk(one: TopK | None, other: TopK | None) -> None:
    assert (one is None) == (other is None)
    if one is not None and other is not None:
        assert one.token_ids.tolist() == other.token_ids.tolist()
        assert_close(one.logprobs, other.logprobs)


def assert_close(found: Any, expected: Any) -> None:
    """Logprobs: a relative error of float32 sums, or what that is for the logits they are differences of."""
    np.testing.assert_allclose(found, expected, rtol=RELATIVE, atol=1e-5)


def assert_same_state(found: AdapterState, expected: AdapterState) -> None:
    assert (found.spec, found.step) == (expected.spec, expected.step)
    for name in ("weights", "grads", "exp_avg", "exp_avg_sq"):
        a, b = getattr(found, name), getattr(expected, name)
        assert (a is None) == (b is None), name
        if a is not None:
            assert_near(a, b, name)


def assert_near(found: torch.Tensor, expected: torch.Tensor, name: str) -> None:
    assert found.shape == expected.shape
    assert float(expected.norm()) > 0, f"{name} is zero, so nothing is compared"
    assert float((found - expected).norm()) <= RELATIVE * float(expected.norm()), name


def passes(
    requests: Sequence[tuple[int, DatumBatch, str]], tokens: int = 4096, **fields: Any
) -> dict[str, Any]:
    """Fields of a tick: a pass for each (slot, datums, loss), in the microbatches of the planner."""
    made: list[Pass] = [
        make_pass(f"p{index}", slot, batch, loss, **fields)
        for index, (slot, batch, loss) in enumerate(requests)
    ]
    batches = [batch for _, batch, _ in requests]
    loads = [Load(p.slot, p.backward, b.lengths.tolist()) for p, b in zip(made, batches, strict=True)]
    return {"passes": tuple(made), "microbatches": pack(loads, tokens, False)}
