"""The engine's account of its memory is that of its tensors."""

from __future__ import annotations

from tests.engine.ticks import run
from twinkle_serve.engine.engine import Engine
from twinkle_serve.protocol.work import Tick, TickReport


def test_every_use_is_counted_by_its_tensors(moe: Engine) -> None:
    memory, pool = moe.memory(), moe.pool
    parameters = dict(moe.base.model.named_parameters())
    assert memory["base"] == sum(parameter.nbytes for parameter in parameters.values())
    experts = [parameter.nbytes for name, parameter in parameters.items() if ".experts." in name]
    assert memory["experts"] == sum(experts) > 0
    assert memory["slots"] == pool.weights.nbytes
    assert memory["gradients"] == pool.grads.nbytes
    assert memory["moments"] == 2 * pool.grads.nbytes
    config, shape = moe.base.config.sampler, moe.base.model.config
    numbers = 2 * shape.num_hidden_layers * shape.num_key_value_heads * shape.head_dim
    assert memory["kv"] == config.kv_cache_tokens * numbers * 4
    assert memory["sampling_adapters"] > 0


def test_a_report_says_it_by_rank(moe: Engine) -> None:
    run(moe)
    report = list(moe.run(Tick(1)))[-1]
    assert isinstance(report, TickReport)
    for use, size in moe.memory().items():
        assert report.gauges[f"rank0/{use}_bytes"] == size
