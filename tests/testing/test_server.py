"""running_server starts what it is told, waits for the ready line, and leaves no process behind."""

from __future__ import annotations

import os
import socket
import sys
from pathlib import Path

import pytest

from twinkle_serve.testing import server
from twinkle_serve.testing.server import free_port, running_server


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A shell script that stands where twinkle-serve does; tests write its body."""
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    script = tmp_path / "twinkle-serve"
    script.touch(mode=0o755)
    return script


def write(script: Path, *lines: str) -> None:
    script.write_text("\n".join(["#!/bin/sh", *lines]) + "\n")


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_a_free_port_can_be_bound() -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", free_port()))


def test_the_block_runs_while_the_server_does(
    command: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(
        command, 'echo "$@" > arguments', "echo starting", "echo ready http://127.0.0.1:7", "exec sleep 600"
    )
    monkeypatch.chdir(tmp_path)
    with running_server(Path("a b.yaml"), ["storage.root=c d"], log=tmp_path / "log") as running:
        assert running.url == "http://127.0.0.1:7"
        assert alive(running.pid)
    assert not alive(running.pid)
    arguments = Path("arguments").read_text()
    assert arguments.startswith("up a b.yaml --set storage.root=c d --set http.port=")


def test_a_port_that_the_caller_chose_is_kept(command: Path, tmp_path: Path) -> None:
    write(command, 'echo "$@"', "echo ready http://x", "exec sleep 600")
    with running_server(tmp_path / "c.yaml", ["http.port=99"], log=tmp_path / "log"):
        pass
    assert (tmp_path / "log").read_text().count("http.port=") == 1


def test_the_server_is_stopped_when_the_block_raises(command: Path, tmp_path: Path) -> None:
    write(command, "echo ready http://x", "exec sleep 600")
    with (
        pytest.raises(KeyError),
        running_server(tmp_path / "c.yaml", log=tmp_path / "log") as running,
    ):
        raise KeyError
    assert not alive(running.pid)


def test_a_server_that_exits_is_an_error_with_its_last_words(command: Path, tmp_path: Path) -> None:
    write(command, "echo no such model >&2", "exit 3")
    with (
        pytest.raises(RuntimeError, match=r"exited with 3:\nno such model"),
        running_server(tmp_path / "c.yaml", log=tmp_path / "log"),
    ):
        pytest.fail("the block must not run")


def test_a_server_that_is_never_ready_is_an_error_and_ends(
    command: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(command, "echo $$ > pid", "echo loading", "exec sleep 600")
    monkeypatch.chdir(tmp_path)
    with (
        pytest.raises(RuntimeError, match=r"not ready after 2 s:\nloading"),
        running_server(tmp_path / "c.yaml", log=tmp_path / "log", ready_s=2.0),
    ):
        pytest.fail("the block must not run")
    assert not alive(int(Path("pid").read_text()))


def test_a_server_that_ignores_sigterm_is_killed_and_reported(
    command: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server, "STOP_S", 0.5)
    write(command, "trap '' TERM", "echo ready http://x", "while :; do sleep 1; done")
    with (
        pytest.raises(RuntimeError, match="ignored SIGTERM"),
        running_server(tmp_path / "c.yaml", log=tmp_path / "log") as running,
    ):
        pass
    assert not alive(running.pid)


def test_the_real_command_refuses_a_wrong_configuration(tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    config.write_text("modles: []\n")
    with (
        pytest.raises(RuntimeError, match="modles"),
        running_server(config, log=tmp_path / "log"),
    ):
        pytest.fail("the block must not run")
