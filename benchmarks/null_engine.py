"""An engine without a model, for measuring everything around it: any pass is answered with zeros at once, a
sample after a fixed time a token.

Knows the shape of answers. Computes nothing; ``python -m benchmarks.null_engine up CONFIG`` is
``twinkle-serve`` with it in the place of the real one.
"""

from __future__ import annotations

import functools
import sys
import time
from collections.abc import Iterator
from typing import Any

import numpy as np

from twinkle_serve.config import ModelConfig
from twinkle_serve.protocol.data import Column, DatumBatch, ForwardResult, SampledSequence, SampleResult
from twinkle_serve.protocol.work import ModelInfo, Outcome, Pass, Progress, Sample, Tick, TickReport

VOCABULARY = 151_936
TOKEN_S = 0.005
ENGINE = "benchmarks.null_engine:NullEngine"


class NullEngine:
    """cluster.worker.Engine."""

    def __init__(self, config: ModelConfig, place: object = None) -> None:
        slots = config.max_resident_adapters
        self.info = ModelInfo(config.name, "null", "none", VOCABULARY, 32_768, 32, slots, (2,))
        self._decoding: list[tuple[float, Sample]] = []

    def probe(self) -> bool:
        return True

    def check_loss(self, graph: str) -> None:
        return None

    def close(self) -> None:
        return None

    def run(self, tick: Tick) -> Iterator[Outcome | Progress | TickReport]:
        for group in (tick.restores, tick.creates, tick.loads, tick.optim_steps, tick.saves, tick.snapshots):
            for item in group:
                yield Outcome(item.request_id, 0 if group is tick.saves else {})
        for each in tick.passes:
            yield Outcome(each.request_id, _zeros(each))
        for sample in tick.samples:
            due = time.monotonic() + TOKEN_S * (sample.request.params.max_tokens or 1)
            self._decoding.append((due, sample))
        if self._decoding and tick.decode_budget_s:
            first = min(due for due, _ in self._decoding)
            time.sleep(max(0.0, min(tick.decode_budget_s, first - time.monotonic())))
        yield from self._drawn()
        yield TickReport(tick.tick_id, {}, len(self._decoding))

    def _drawn(self) -> Iterator[Outcome]:
        now = time.monotonic()
        over = [sample for due, sample in self._decoding if due <= now]
        self._decoding = [(due, sample) for due, sample in self._decoding if due > now]
        for sample in over:
            count = sample.request.params.max_tokens or 1
            sequence = SampledSequence(np.ones(count, np.int32), np.zeros(count, np.float32), "length")
            yield Outcome(sample.request_id, SampleResult((sequence,) * sample.request.num_samples))


def _zeros(each: Pass) -> ForwardResult:
    batch = DatumBatch.unpack(each.datums)
    logprobs = Column(np.zeros(batch.num_tokens, np.float32), np.zeros(batch.num_datums, np.int32))
    return ForwardResult(logprobs, np.asarray(batch.lengths, np.int64), {"loss:sum": 0.0})


def main() -> int:
    from twinkle_serve import cli, up

    start = up._start

    def start_with_this(config: Any) -> None:
        from twinkle_serve.cluster import coordinator

        # The first to ask makes the coordinator, with this engine; replicas find it by its name.
        find: Any = functools.partial(coordinator.find_or_create, engine=ENGINE)
        coordinator.find_or_create = find
        start(config)

    up._start = start_with_this
    return cli.main(sys.argv[1:])


if __name__ == "__main__":
    sys.exit(main())
