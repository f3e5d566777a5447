"""An engine of several ranks that computes nothing but really meets the others: each pass is a collective.

``loss_config["rank"]`` says which rank the fault in ``loss_fn`` is planted on.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from datetime import timedelta

from twinkle_serve.config import ModelConfig
from twinkle_serve.engine.pulse import PULSE
from twinkle_serve.engine.sharding.place import RankPlace
from twinkle_serve.protocol.work import ModelInfo, Outcome, Pass, Tick, TickReport


class GlooEngine:
    def __init__(self, config: ModelConfig, place: RankPlace) -> None:
        import torch.distributed as dist

        dist.init_process_group(
            "gloo",
            init_method=place.address,
            rank=place.rank,
            world_size=place.world_size,
            timeout=timedelta(seconds=place.timeout_s),
        )
        self._rank = place.rank
        self.info = ModelInfo(config.name, "gloo", config.path, 100, 512, 32, 4, (0,))

    def probe(self) -> bool:
        return self._sum(1.0) > 1.0

    def close(self) -> None:
        pass

    def run(self, tick: Tick) -> Iterator[Outcome | TickReport]:
        PULSE.enter("passes")
        for item in tick.passes:
            if item.loss_config.get("rank") == self._rank:
                if item.loss_fn == "skip":
                    continue
                self._fail(item)
            yield Outcome(item.request_id, {"sum": self._sum(self._rank + 1.0), "pid": float(os.getpid())})
        for step in tick.optim_steps:
            yield Outcome(step.request_id, {"interface": os.environ.get("GLOO_SOCKET_IFNAME", "")})
        yield TickReport(tick.tick_id)

    def _fail(self, item: Pass) -> None:
        if item.loss_fn == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        if item.loss_fn == "stop":
            os.kill(os.getpid(), signal.SIGSTOP)
        if item.loss_fn == "raise":
            raise RuntimeError("planted")
        if item.loss_fn == "loop":
            self.endless_loop()
        if item.loss_fn == "slow":
            for _ in range(int(item.loss_config["beats"])):
                time.sleep(0.1)
                PULSE.beat()

    def endless_loop(self) -> None:
        number = 0
        while True:
            number += 1

    def _sum(self, value: float) -> float:
        import torch
        import torch.distributed as dist

        tensor = torch.tensor([value])
        dist.all_reduce(tensor)
        return float(tensor)
