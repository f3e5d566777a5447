from __future__ import annotations

import pytest

from tests.control.echo_group import pass_command
from tests.control.plane import optim
from twinkle_serve.control.backend import (
    LoadCommand,
    RejectedCommand,
    SaveCommand,
    SnapshotCommand,
    UnloadCommand,
)
from twinkle_serve.control.commands import BirthCommand, Stage, next_stage, num_tokens
from twinkle_serve.protocol.work import Failure

COMMANDS = {
    "birth": BirthCommand(),
    "load": LoadCommand("tinker://r/weights/n", False),
    "forward": pass_command("f", backward=False),
    "backward": pass_command("b"),
    "optim": optim(),
    "save": SaveCommand("weights", "n"),
    "snapshot": SnapshotCommand(0),
    "unload": UnloadCommand(),
    "rejected": RejectedCommand(Failure("no")),
}


def prefix(names: str) -> str:
    """As many of the commands as one tick may hold."""
    stage, taken = Stage.START, []
    for name in names.split():
        following = next_stage(stage, COMMANDS[name])
        if following is None:
            break
        stage = following
        taken.append(name)
    return " ".join(taken)


@pytest.mark.parametrize(
    ("log", "one_tick"),
    [
        ("backward optim backward optim", "backward optim"),
        (
            "forward backward backward optim save snapshot save forward",
            "forward backward backward optim save snapshot save",
        ),
        ("load load backward", "load"),
        ("load backward", "load"),
        ("backward load", "backward"),
        ("optim optim", "optim"),
        ("optim load", "optim"),
        ("save optim", "save"),
        ("save backward", "save"),
        ("snapshot save snapshot", "snapshot save snapshot"),
        ("birth backward", "birth"),
        ("unload backward", "unload"),
        ("backward unload", "backward"),
        ("save birth", "save"),
        (
            "rejected backward rejected optim rejected save rejected",
            "rejected backward rejected optim rejected save rejected",
        ),
        ("rejected birth rejected backward", "rejected birth rejected"),
    ],
)
def test_the_longest_prefix_that_a_tick_keeps_in_order(log, one_tick):
    assert prefix(log) == one_tick


def test_only_passes_cost_tokens():
    assert num_tokens(pass_command("f", 3, 4)) == 7
    assert {num_tokens(c) for name, c in COMMANDS.items() if "ward" not in name} == {0}
