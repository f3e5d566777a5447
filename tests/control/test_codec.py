"""Every command and result survives being written down; nothing else is taken for one."""

from __future__ import annotations

import numpy as np
import pytest

from twinkle_serve.control.backend import (
    Command,
    LoadCommand,
    OptimCommand,
    PassCommand,
    RejectedCommand,
    SaveCommand,
    SnapshotCommand,
    UnloadCommand,
)
from twinkle_serve.control.codec import decode_command, decode_result, encode_command, encode_result
from twinkle_serve.control.commands import BirthCommand
from twinkle_serve.protocol.data import AdamParams, Column, DatumBatch, ForwardResult
from twinkle_serve.protocol.work import Failure

DATUMS = DatumBatch(np.arange(5, dtype=np.int32), np.array([2, 3])).pack()
COMMANDS = [
    BirthCommand(),
    BirthCommand("tinker://a/weights/b", True),
    PassCommand(DATUMS, (2, 3), "ppo", {"clip_low": 0.8, "mode": "x"}, True),
    PassCommand(DATUMS, (2, 3), "custom", {"graph": "{}"}, True, 640),
    OptimCommand(AdamParams(1e-4, 0.9, 0.95, 1e-12, 0.01, 1.0)),
    SaveCommand("weights", None),
    SaveCommand("sampler_weights", "naïve \0", 3600, True, {"a": "b"}),
    SnapshotCommand(7),
    LoadCommand("tinker://a/weights/b", False),
    UnloadCommand(),
    RejectedCommand(Failure("no", "server")),
]


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: type(command).__name__)
def test_a_command_comes_back_equal(command):
    assert decode_command(encode_command(command)) == command


def test_every_kind_of_command_is_covered():
    assert {type(command) for command in COMMANDS} == {*Command.__args__, BirthCommand}


def test_a_forward_result_comes_back_to_the_bit():
    values = np.array([0.1, -np.inf, np.nan, 1e-40], np.float32)
    before = ForwardResult(
        Column(values, np.array([0, 2], np.int32)), np.array([2, 1]), {"loss:sum": 0.1 + 0.2}
    )
    after, failure = decode_result(encode_result(before, None))
    assert failure is None
    assert after.logprobs.values.tobytes() == values.tobytes()
    assert after.logprobs.widths.tolist() == [0, 2]
    assert after.lengths.tolist() == [2, 1]
    assert after.lengths.dtype == np.int64
    assert after.metrics == before.metrics


@pytest.mark.parametrize("value", [None, {"path": "tinker://x", "size_bytes": 3}, {"grad_norm": 0.1}])
def test_a_plain_result_and_a_failure_come_back(value):
    assert decode_result(encode_result(value, None)) == (value, None)
    assert decode_result(encode_result(None, Failure("why", "user"))) == (None, Failure("why", "user"))


@pytest.mark.parametrize("data", [b"", b"TWC1", b"abcdefghij", encode_result(None, None)])
def test_anything_else_is_refused(data):
    with pytest.raises(ValueError, match=r"."):
        decode_command(data)
