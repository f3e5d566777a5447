from __future__ import annotations

import os
import subprocess
import time
from pathlib import Path

import pytest

from benchmarks.measure import cpu_of, end_tree
from benchmarks.peers import environment
from benchmarks.peers.environment import Environment, NotInstallable, NotStarted, start, wait_for


@pytest.fixture
def made(monkeypatch):
    """Answers for the commands that make an environment: each is noted, and pip's may fail."""

    class Made(list):
        error = ""

    found = Made()

    def run(command, **options):
        found.append(command)
        if "pip" in command and found.error:
            raise subprocess.CalledProcessError(1, command, stderr=found.error)
        if "venv" in command:
            Path(command[-1]).mkdir(parents=True)

    monkeypatch.setattr(environment.subprocess, "run", run)
    return found


def test_an_environment_is_made_once(made, tmp_path):
    fits: list[Path] = []
    peer = Environment("peer 1.0", tmp_path / "peer", ("peer==1.0",), "2 GB", fits.append)
    assert peer.install() == peer.install() == peer.installed() == tmp_path / "peer" / "bin" / "python"
    assert [command[2] for command in made] == ["venv", "pip"]
    assert made[1][-1] == "peer==1.0"
    assert fits == [tmp_path / "peer"]


def test_why_it_cannot_be_installed_is_kept_until_it_can(made, tmp_path):
    peer = Environment("peer 1.0", tmp_path / "peer", ("peer==1.0",), "2 GB")
    with pytest.raises(NotInstallable, match="make peers` does it \\(2 GB\\)"):
        peer.installed()
    made.error = "much\nERROR: No matching distribution"
    with pytest.raises(NotInstallable):
        peer.install()
    with pytest.raises(NotInstallable, match=r"^peer 1.0 cannot be installed here: ERROR: No matching"):
        peer.installed()
    made.error = ""
    assert peer.install() == peer.installed()


def test_a_release_that_does_not_fit_is_not_installed(made, tmp_path):
    def refuse(directory: Path) -> None:
        raise NotInstallable("no such module")

    peer = Environment("peer 1.0", tmp_path / "peer", (), "2 GB", refuse)
    with pytest.raises(NotInstallable):
        peer.install()
    with pytest.raises(NotInstallable, match="no such module"):
        peer.installed()


def test_a_server_that_ends_before_it_is_ready_shows_its_last_words(tmp_path):
    log = tmp_path / "log"
    process = start(["sh", "-c", "echo no memory; exit 1"], log, os.environ)
    with pytest.raises(NotStarted, match="peer did not start:\nno memory"):
        wait_for("ready", log, process, who="peer")


def test_a_server_is_ended_with_its_children(tmp_path):
    log = tmp_path / "log"
    process = start(["sh", "-c", "sleep 1000 & echo child $!.; wait"], log, os.environ)
    wait_for(".", log, process, who="peer")
    child = int(log.read_text().split()[1].rstrip("."))
    end_tree(process)
    assert process.returncode == -9
    while cpu_of([child]) and " Z " not in Path(f"/proc/{child}/stat").read_text():
        time.sleep(0.01)  # it was killed; this ends, or the test's own deadline comes
