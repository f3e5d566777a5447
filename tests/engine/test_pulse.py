from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.engine.ticks import sample
from twinkle_serve.engine.attention import PackedCausal
from twinkle_serve.engine.engine import Engine
from twinkle_serve.engine.pulse import PULSE
from twinkle_serve.protocol.work import Tick

NUM_LAYERS = 2


@pytest.mark.parametrize("checkpointing", [False, True])
def test_every_layer_beats_forward_and_backward(
    engine_for: Callable[..., Engine], tiny_moe: Path, checkpointing: bool
) -> None:
    base = engine_for(tiny_moe, activation_checkpointing=checkpointing).base
    base.segments.set({})
    before = PULSE.count
    hidden = base.hidden_states(torch.arange(4), torch.arange(4), PackedCausal([4]))
    forward = PULSE.count
    assert forward - before == NUM_LAYERS
    hidden.sum().backward()
    backward = PULSE.count
    assert backward - forward >= NUM_LAYERS
    with torch.no_grad():
        base.hidden_states(torch.arange(4), torch.arange(4), PackedCausal([4]))
    assert PULSE.count - backward == NUM_LAYERS


def test_every_layer_beats_for_samples_too(moe: Engine) -> None:
    assert moe._sampler._pass.is_straight  # through no module that could be heard
    before = PULSE.count
    sample(moe, [5, 7, 9], max_tokens=4)
    phases, passes = 6, 1 + 3  # the prompt, and each token but the last
    assert PULSE.count - before == phases + passes * NUM_LAYERS


def test_the_phases_of_a_tick_are_named_as_they_come(moe: Engine) -> None:
    before = PULSE.count
    seen = [PULSE.phase for _ in moe.run(Tick(1))]
    assert seen == ["report"]
    assert PULSE.count - before == 6
