"""Short ways to ask an engine for work, and random work to ask for.

Each call is a tick of its own; passes are cut into microbatches as the planner cuts them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from twinkle_serve.control.microbatches import Load, pack
from twinkle_serve.engine.engine import Engine
from twinkle_serve.engine.peft_format import export_peft
from twinkle_serve.engine.slots import trained_groups
from twinkle_serve.protocol.data import (
    AdamParams,
    Column,
    DatumBatch,
    ForwardResult,
    LoraSpec,
    SampleRequest,
    SampleResult,
    SamplingParams,
)
from twinkle_serve.protocol.work import (
    AdapterRef,
    CreateAdapter,
    OptimStep,
    Outcome,
    PageIn,
    PageOut,
    Pass,
    Sample,
    Snapshot,
    Tick,
    TickReport,
)

VOCAB_SIZE = 350
LOSSES = ("cross_entropy", "importance_sampling", "ppo", "cispo", "dro", "gspo")
ADAM = AdamParams(learning_rate=1e-2, eps=1e-8)


def run(engine: Engine, **fields: Any) -> dict[str, Outcome]:
    """The outcomes of one tick by request id."""
    outcomes = list(engine.run(Tick(1, **fields)))
    report = outcomes.pop()
    assert isinstance(report, TickReport)
    found: dict[str, Outcome] = {}
    for outcome in outcomes:
        assert isinstance(outcome, Outcome)
        assert outcome.request_id not in found
        found[outcome.request_id] = outcome
    return found


def value(outcome: Outcome) -> Any:
    assert outcome.failure is None, outcome.failure
    return outcome.value


def create(engine: Engine, slot: int, spec: LoraSpec, *, moved: bool = False) -> None:
    """A fresh adapter. moved: with B random as well, so that every factor has a gradient."""
    assert value(run(engine, creates=(CreateAdapter("create", f"run{slot}", slot, spec),))["create"]) is None
    if moved:
        generator = torch.Generator().manual_seed(spec.seed + 1)
        block = engine.pool.blocks(slot)[0]
        for target in engine.base.layout.targets:
            if target.group in trained_groups(spec):
                b_t = engine.base.layout.b_t(block, target)
                b_t.copy_(torch.randn(b_t.shape, generator=generator) * 0.05)


def tensors(engine: Engine, slot: int, which: str = "weights") -> dict[str, torch.Tensor]:
    """What is in a slot, by PEFT key: its weights, or its gradients ("grads")."""
    index = ("weights", "grads", "exp_avg", "exp_avg_sq").index(which)
    spec = engine.pool.adapter(slot).spec
    return export_peft(engine.base.layout, engine.pool.blocks(slot)[index], spec, "base")[1]


def make_pass(
    request_id: str,
    slot: int,
    batch: DatumBatch,
    loss: str = "cross_entropy",
    config: Mapping[str, float] | None = None,
    *,
    backward: bool = True,
) -> Pass:
    return Pass(request_id, slot, batch.pack(), loss, config or {}, backward)


def run_passes(engine: Engine, passes: Sequence[Pass], *, tokens: int | None = None) -> dict[str, Outcome]:
    """Several passes in one tick, in the microbatches that the planner would make."""
    batches = [DatumBatch.unpack(p.datums) for p in passes]
    loads = [Load(p.slot, p.backward, b.lengths.tolist()) for p, b in zip(passes, batches, strict=True)]
    config = engine.base.config
    plan = pack(loads, tokens or config.microbatch_tokens, config.deterministic)
    return run(engine, passes=tuple(passes), microbatches=plan)


def forward_backward(
    engine: Engine,
    slot: int,
    batch: DatumBatch,
    loss: str = "cross_entropy",
    config: Mapping[str, float] | None = None,
    *,
    backward: bool = True,
) -> ForwardResult:
    only = make_pass("pass", slot, batch, loss, config, backward=backward)
    result: ForwardResult = value(run_passes(engine, [only])["pass"])
    return result


def optim_step(engine: Engine, slot: int, params: AdamParams = ADAM) -> dict[str, float]:
    metrics: dict[str, float] = value(run(engine, optim_steps=(OptimStep("step", slot, params),))["step"])
    return metrics


def page_out(engine: Engine, slot: int, run_id: str) -> None:
    run(engine, page_out=(PageOut(slot, run_id),))


def page_in(engine: Engine, slot: int, run_id: str) -> None:
    run(engine, page_in=(PageIn(slot, run_id),))


def snapshot(engine: Engine, slot: int, name: str) -> AdapterRef:
    value(run(engine, snapshots=(Snapshot("snapshot", slot, name),))["snapshot"])
    return AdapterRef(name)


def make_sample(
    request_id: str, prompt: Sequence[int], adapter: AdapterRef | None = None, **fields: Any
) -> Sample:
    """``fields``: those of SampleRequest, and those of SamplingParams."""
    names = set(SampleRequest.__dataclass_fields__)
    request = {name: fields.pop(name) for name in list(fields) if name in names}
    params = SamplingParams(**fields)
    return Sample(request_id, "tenant", adapter, SampleRequest(np.array(prompt, np.int32), params, **request))


def sample(
    engine: Engine, prompt: Sequence[int], adapter: AdapterRef | None = None, **fields: Any
) -> SampleResult:
    found = run(engine, samples=(make_sample("sample", prompt, adapter, **fields),), decode_budget_s=60.0)
    result: SampleResult = value(found["sample"])
    return result


def random_batch(
    rng: np.random.Generator, lengths: Sequence[int], loss: str = "cross_entropy", *, k: int = 0
) -> DatumBatch:
    """Datums with every column that the loss reads. k: [N, K] targets."""
    count = sum(lengths)
    size = count * max(1, k)
    widths = np.full(len(lengths), k, np.int32)

    def column(values: Any) -> Column:
        return Column(np.asarray(values), widths)

    columns = {"target_tokens": column(rng.integers(0, VOCAB_SIZE, size))}
    if loss == "cross_entropy":
        columns["weights"] = column(rng.random(size, np.float32))
    else:
        columns["logprobs"] = column((-5.9 + 0.3 * rng.standard_normal(size)).astype(np.float32))
        columns["advantages"] = column(rng.standard_normal(size).astype(np.float32))
    tokens = rng.integers(0, VOCAB_SIZE, count).astype(np.int32)
    return DatumBatch(tokens, np.array(lengths, np.int64), columns)
