"""An engine that computes nothing: what a pass answers, or how it goes wrong, is its loss_fn."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Never

import numpy as np

from twinkle_serve.config import ModelConfig
from twinkle_serve.engine.sharding.place import RankPlace
from twinkle_serve.protocol.data import Column, ForwardResult
from twinkle_serve.protocol.work import ModelInfo, Outcome, Pass, Tick, TickReport


class _Deadly:
    """A large result whose rank dies while it is stored."""

    nbytes = 10**6

    def __reduce__(self) -> Never:
        time.sleep(1)  # the outcome before it is on its way to the coordinator
        os.kill(os.getpid(), signal.SIGKILL)
        raise AssertionError


class StandinEngine:
    def __init__(self, config: ModelConfig, place: RankPlace | None = None) -> None:
        if config.path == "missing":
            raise FileNotFoundError("no config.json\nin there")
        if config.path == "deadly":
            os.kill(os.getpid(), signal.SIGKILL)
        self.info = ModelInfo(config.name, "standin", config.path, 100, 512, 32, 4, (0,))
        self._unsaved: list[str] = []

    def probe(self) -> bool:
        return self.info.tokenizer_id != "broken"

    def close(self) -> None:
        path = Path(self.info.tokenizer_id)
        if path.is_absolute():
            path.with_suffix(".closed").touch()

    def run(self, tick: Tick) -> Iterator[Outcome | TickReport]:
        for request_id in self._unsaved:
            yield Outcome(request_id, 42)
        self._unsaved = [save.request_id for save in tick.saves]
        for item in tick.creates:
            yield Outcome(item.request_id)
        for item in tick.passes:
            yield self._pass(item)
        for step in tick.optim_steps:
            yield Outcome(step.request_id, {"pid": float(os.getpid())})
        yield TickReport(tick.tick_id, {"all": 0.0})

    def _pass(self, item: Pass) -> Outcome:
        if item.loss_fn == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        if item.loss_fn == "die when stored":
            return Outcome(item.request_id, _Deadly(), num_bytes=_Deadly.nbytes)
        if item.loss_fn == "raise":
            raise RuntimeError("planted")
        if item.loss_fn == "hang":
            while True:
                time.sleep(0.01)
        size = int(item.loss_config.get("floats", 4))
        logprobs = Column(np.arange(size, dtype=np.float32), np.zeros(1, np.int32))
        return Outcome(item.request_id, ForwardResult(logprobs, np.array([size]), {"loss:sum": 1.0}))
