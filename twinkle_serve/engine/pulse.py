"""This process's sign of life: which part of a tick it is in, and when it last got on.

Knows a clock and how to hear each layer of a model. Does not know who looks (cluster/worker.py) nor what
silence means (cluster/watch.py). A tick may take long; what must not take long is the next beat.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from twinkle_serve.faults import reach

if TYPE_CHECKING:
    from torch import nn


@dataclass(slots=True)
class Pulse:
    """phase: of the tick. count: beats so far. at: when the last one was, ``time.monotonic()``."""

    phase: str = "idle"
    count: int = 0
    at: float = field(default_factory=time.monotonic)

    def enter(self, phase: str) -> None:
        self.phase = phase
        self.beat()

    def beat(self) -> None:
        self.count += 1
        self.at = time.monotonic()


PULSE = Pulse()


def listen(layers: Iterable[nn.Module]) -> None:
    """Let each of these layers beat as it goes forward, and again as it goes backward."""
    for layer in layers:
        layer.register_forward_hook(_forward)


def _forward(layer: nn.Module, inputs: Any, output: Any) -> None:
    PULSE.beat()
    hidden = output[0] if isinstance(output, tuple) else output
    if hidden.requires_grad:
        reach("before backward")
        hidden.register_hook(_backward)


def _backward(grad: Any) -> None:
    reach("in backward")
    PULSE.beat()
