"""The command: what it prints, when it fails with one line, and that ``up`` leaves nothing behind."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from twinkle_serve.cli import main
from twinkle_serve.cluster.private_ray import descendants
from twinkle_serve.config import load_config
from twinkle_serve.testing.server import RunningServer, free_port, running_server
from twinkle_serve.up import url_of

COMMAND = str(Path(sys.executable).parent / "twinkle-serve")


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    directory = tmp_path / "a path with spaces"
    directory.mkdir()
    monkeypatch.chdir(directory)
    (directory / "config.yaml").write_text(yaml.safe_dump({"models": [{"name": "tiny", "path": "m"}]}))
    return directory / "config.yaml"


def _fails(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(arguments) == 1
    out, err = capsys.readouterr()
    assert out == ""
    (line,) = err.splitlines()
    assert line.startswith("twinkle-serve: ")
    return line.removeprefix("twinkle-serve: ")


def test_check_config_says_what_is_served(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check-config", str(config), "--set", "http.port=8123"]) == 0
    assert "serves tiny at http://127.0.0.1:8123" in capsys.readouterr().out
    assert main(["check-config", str(config), "--set", "http.host='::1'"]) == 0
    assert "serves tiny at http://[::1]:8000" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("host", "shown"),
    [("127.0.0.1", "127.0.0.1"), ("0.0.0.0", "127.0.0.1"), ("::1", "[::1]"), ("::", "[::1]")],
)
def test_clients_are_told_an_address_that_they_can_use(config: Path, host: str, shown: str) -> None:
    loaded = load_config(config, [f"http.host='{host}'", "auth.allow_public=true"])
    assert url_of(loaded) == f"http://{shown}:8000"


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("http.port=99999", "http.port: Input should be less than or equal to 65535"),
        ("http.colour=red", "http.colour: Extra inputs are not permitted"),
        ("models.0.max_rank=64", "models.0.max_rank: Input should be less than or equal to 32"),
        (
            "http.host=0.0.0.0",
            "auth.mode open lets anybody in, so http.host 0.0.0.0 must be a loopback address",
        ),
        ("http.route_prefix=/x/", "http.route_prefix: String should match pattern"),
        ("http.route_prefix='/{a}'", "http.route_prefix: String should match pattern"),
        ("storage.root=~nosuch/x", "Could not determine home directory"),
        ("models.0.path=~nosuch/x", "Could not determine home directory"),
        ("nonsense", "--set 'nonsense': expected dotted.key=value"),
        ("http.port=[", "--set 'http.port=[': the value is not YAML; quote it"),
        ("models.0.name=@x", "--set 'models.0.name=@x': the value is not YAML; quote it"),
    ],
)
@pytest.mark.parametrize("command", ["up", "check-config", "print-config"])
def test_a_wrong_setting_is_one_line(
    config: Path, capsys: pytest.CaptureFixture[str], command: str, override: str, line: str
) -> None:
    assert _fails(capsys, command, str(config), "--set", override).startswith(line)


def test_a_storage_that_cannot_be_used_is_one_line(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = ("--set", "storage.root=/dev/null/x")
    assert "/dev/null" in _fails(capsys, "keys", str(config), "list", *settings)


def test_several_wrong_settings_are_one_line(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = _fails(capsys, "check-config", str(config), "--set", "http.port=0", "--set", "ray.x=1")
    assert "http.port: " in line
    assert "; ray.x: " in line


def test_a_missing_file_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "No such file" in _fails(capsys, "up", str(tmp_path / "none.yaml"))


def test_print_config_can_be_read_again(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for form in ([], ["--serve"]):
        assert main(["print-config", str(config), "--set", "http.port=8123", *form]) == 0
        printed = config.with_name("printed.yaml")
        printed.write_text(capsys.readouterr().out)
        assert load_config(printed) == load_config(config, ["http.port=8123"])


def test_print_config_serve_keeps_a_tenants_limit_that_is_the_default(
    config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Left out, it would become the one that is said for all tenants."""
    limits = {"tenant": {"live_runs": 4, "weight": 5}, "tenants": {"vip": {"live_runs": 256, "weight": 1.0}}}
    config.write_text(yaml.safe_dump({"models": [{"name": "tiny", "path": "m"}], "limits": limits}))
    assert main(["print-config", str(config), "--serve"]) == 0
    printed = config.with_name("printed.yaml")
    printed.write_text(capsys.readouterr().out)
    assert load_config(printed) == load_config(config)
    assert load_config(printed).limits.of("vip").live_runs == 256


def test_print_config_serve_is_what_ray_serve_takes(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from ray.serve.schema import ServeDeploySchema

    main(["print-config", str(config), "--serve"])
    tree = yaml.safe_load(capsys.readouterr().out)
    ServeDeploySchema.model_validate(tree)
    (application,) = tree["applications"]
    assert application["import_path"] == "twinkle_serve.app:build_app"
    assert application["args"]["models"] == [{"name": "tiny", "path": str(config.parent / "m")}]


def test_only_up_needs_ray_or_torch(config: Path) -> None:
    program = (
        "import sys; from twinkle_serve.cli import main; code = main(sys.argv[1:]); "
        "sys.exit(code or bool({'ray', 'torch', 'fastapi'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", program, "check-config", str(config)], check=False)
    assert done.returncode == 0


# up -----------------------------------------------------------------------------------------------------


@pytest.fixture
def start(config: Path, tiny_llama: Path) -> Iterator[Callable[..., Any]]:
    """Start ``up`` on the tiny model; every process it started is known by being below it."""
    started: list[Any] = []

    def start(name: str, temporary: Path, *overrides: str) -> RunningServer:
        """temporary: where this server has its temporary files."""
        settings = [f"models.0.path={tiny_llama}", "models.0.num_threads=1", *overrides]
        settings += [f"storage.root={name}", "http.replicas=1"]
        log, environment = config.with_name(f"{name}.log"), {"TMPDIR": str(temporary)}
        context = running_server(config, settings, log=log, environment=environment)
        started.append(context)
        return context.__enter__()

    yield start
    for context in started:
        context.__exit__(None, None, None)


@pytest.fixture
def temporary() -> Iterator[Path]:
    """A directory with so short a name that Ray can have its sockets there."""
    with tempfile.TemporaryDirectory(dir="/tmp", prefix="tw") as directory:
        yield Path(directory)


def _get(url: str) -> dict[str, Any]:
    with urllib.request.urlopen(url, timeout=10) as answer:
        value: dict[str, Any] = json.load(answer)
        return value


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) != 0


def _gone(pids: set[int]) -> bool:
    return not any(Path(f"/proc/{pid}").exists() for pid in pids)


def _listening(pids: set[int]) -> set[str]:
    """Local addresses (hexadecimal, as in /proc/net) that these processes listen on."""
    inodes = set()
    for pid in pids:
        for link in Path(f"/proc/{pid}/fd").glob("*"):
            try:
                inodes.add(os.readlink(link).removeprefix("socket:[").removesuffix("]"))
            except OSError:
                continue
    tables = "".join(Path(f"/proc/net/{table}").read_text() for table in ("tcp", "tcp6"))
    rows = [line.split() for line in tables.splitlines()]
    return {row[1].split(":")[0] for row in rows if len(row) > 9 and row[3] == "0A" and row[9] in inodes}


def _stops_to_the_last_process(server: RunningServer, number: signal.Signals) -> None:
    pids = descendants(server.pid) | {server.pid}
    assert len(pids) > 8
    assert _listening(pids) <= {"0100007F", "0000000000000000FFFF00000100007F"}
    begun = time.monotonic()
    os.kill(server.pid, number)
    os.waitid(os.P_PID, server.pid, os.WEXITED | os.WNOWAIT)
    assert time.monotonic() - begun < 30
    assert _gone(pids - {server.pid})
    assert _is_free(int(server.url.split(":")[2].partition("/")[0]))
    lines = server.log.read_text().splitlines()
    assert [line for line in lines if line.startswith("ready")] == [f"ready {server.url}"]
    assert "Traceback" not in server.log.read_text()


@pytest.mark.slow
def test_two_servers_serve_on_loopback_only_and_each_stops_to_its_last_process(
    start: Callable[..., RunningServer], tmp_path: Path, temporary: Path
) -> None:
    roomy = tmp_path / "a temporary directory with room for paged adapters"
    roomy.mkdir()
    one, two = start("one", temporary), start("two", roomy, "http.route_prefix=/two")
    for server in (one, two):
        assert _get(f"{server.url}/api/v1/healthz") == {"status": "ok"}
    assert two.url.endswith("/two")
    assert len(list(roomy.glob("twinkle-*/twinkle-pages-*"))) == 1, "`doctor` looks for room for them there"
    _stops_to_the_last_process(one, signal.SIGTERM)
    assert _get(f"{two.url}/api/v1/healthz") == {"status": "ok"}
    _stops_to_the_last_process(two, signal.SIGINT)
    assert not [*temporary.iterdir(), *roomy.iterdir()]


def _up(config: Path, *settings: str) -> subprocess.CompletedProcess[str]:
    command = [COMMAND, "up", str(config), *(part for setting in settings for part in ("--set", setting))]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


def _reason(done: subprocess.CompletedProcess[str]) -> str:
    assert done.returncode == 1
    assert done.stdout == ""
    return done.stderr.splitlines()[-1]


@pytest.mark.slow
def test_up_fails_with_one_line_when_the_port_is_taken(config: Path) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        reason = _reason(_up(config, f"http.port={port}"))
    assert reason == f"twinkle-serve: http.port {port} on 127.0.0.1 cannot be used: Address already in use"


@pytest.mark.parametrize(
    ("setting", "reason"),
    [
        ("storage.root={}", "storage.root {} cannot be written: Not a directory"),
        ("monitoring.log_file={}/log", "monitoring.log_file {}/log cannot be written: Not a directory"),
        ("monitoring.log_file=/", "monitoring.log_file / cannot be written: Is a directory"),
    ],
)
def test_up_fails_with_one_line_where_it_cannot_write(
    config: Path, tmp_path: Path, setting: str, reason: str
) -> None:
    below = tmp_path / "a file" / "in the way"
    below.parent.touch()
    done = _up(config, f"http.port={free_port()}", setting.format(below))
    assert _reason(done) == f"twinkle-serve: {reason.format(below)}"


def test_up_fails_with_one_line_without_haproxy(config: Path) -> None:
    """As where pip has put scripts elsewhere than beside this Python."""
    program = (
        "import sys; from twinkle_serve.cluster import haproxy; haproxy.sys.executable = '/nowhere/python'; "
        "from twinkle_serve.cli import main; sys.exit(main(sys.argv[1:]))"
    )
    settings = ("--set", "http.proxy=haproxy", "--set", f"http.port={free_port()}")
    command = [sys.executable, "-c", program, "up", str(config), *settings]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 1
    assert (
        _reason(done) == "twinkle-serve: /nowhere/twinkle-haproxy is not there: install this package with pip"
    )


@pytest.mark.slow
def test_up_fails_with_one_line_when_the_model_does_not_load(config: Path) -> None:
    reason = _reason(_up(config, f"http.port={free_port()}"))
    assert reason.startswith("twinkle-serve: cannot load tiny from ")
    assert "does not exist" in reason


def _wait_for_ray(process: subprocess.Popen[str], name: bytes = b"/gcs_server") -> int:
    """Until this one of Ray's processes runs, by default the first: others are still being started."""
    while not (found := [pid for pid in descendants(process.pid) if _program(pid).endswith(name)]):
        assert process.poll() is None
        time.sleep(0.01)
    return found[0]


def _program(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().partition(b"\0")[0]
    except OSError:
        return b""


def _wait_for_connection(process: subprocess.Popen[str]) -> None:
    """Until all of Ray runs and ``up`` connects to it."""
    own = f"twinkle-*/session_latest/logs/python-core-driver-*_{process.pid}.log"
    while "TMPDIR" not in (environment := _environment(process.pid)):  # the program is still being loaded
        assert process.poll() is None
    temporary = Path(environment["TMPDIR"])
    while not any(temporary.glob(own)):
        assert process.poll() is None
        time.sleep(0.001)


def _wait_for_model(process: subprocess.Popen[str]) -> None:
    assert process.stderr is not None
    while "loading base model" not in process.stderr.readline():
        assert process.poll() is None


def _environment(pid: int) -> dict[str, str]:
    """What the process was started with; nothing if it is not ours or has ended."""
    try:
        lines = Path(f"/proc/{pid}/environ").read_text(errors="replace").split("\0")
    except OSError:
        return {}
    return dict(line.partition("=")[::2] for line in lines)


def _with_temporary_files_in(directory: Path) -> set[int]:
    pids = [int(entry.name) for entry in Path("/proc").glob("[0-9]*")]
    return {pid for pid in pids if _environment(pid).get("TMPDIR", "").startswith(str(directory))}


@pytest.mark.slow
@pytest.mark.parametrize(
    "wait", [_wait_for_ray, _wait_for_connection, _wait_for_model], ids=["ray", "connection", "model"]
)
def test_a_signal_while_starting_leaves_nothing_behind(
    config: Path, tiny_llama: Path, temporary: Path, wait: Callable[[Any], None]
) -> None:
    settings = ["--set", f"models.0.path={tiny_llama}", "--set", f"http.port={free_port()}"]
    with subprocess.Popen(
        [COMMAND, "up", str(config), *settings],
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"TMPDIR": str(temporary)},
    ) as process:
        wait(process)
        assert len(_with_temporary_files_in(temporary)) > 1
        process.send_signal(signal.SIGTERM)
        assert process.stderr is not None
        rest = process.stderr.read()
        assert process.wait(30) == 0, rest
    assert rest.count("stopping on SIGTERM") == 1
    assert rest.splitlines()[-1] == "[twinkle-serve] stopped"
    assert not _with_temporary_files_in(temporary)
    assert not list(temporary.iterdir())


@pytest.mark.slow
def test_a_signal_while_ray_does_not_start_is_told_of_at_once(config: Path, temporary: Path) -> None:
    with subprocess.Popen(
        [COMMAND, "up", str(config), "--set", f"http.port={free_port()}"],
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"TMPDIR": str(temporary)},
    ) as process:
        stalled = _wait_for_ray(process, b"/raylet")
        os.kill(stalled, signal.SIGSTOP)
        process.send_signal(signal.SIGINT)
        assert process.stderr is not None
        while "stopping on SIGINT" not in (line := process.stderr.readline()):
            assert line, "it ended and had not said that it would"
        assert _program(stalled), "Ray is still being waited for"
        os.kill(stalled, signal.SIGCONT)
        rest = process.stderr.read()
        assert process.wait(30) == 0, rest
    assert rest == "[twinkle-serve] stopped\n"
    assert not _with_temporary_files_in(temporary)


def test_keys_are_given_out_listed_rotated_and_revoked(
    config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def keys(*arguments: str) -> str:
        assert main(["keys", str(config), *arguments]) == 0
        return capsys.readouterr().out.strip()

    first = keys("create", "alice")
    assert first.startswith("tml-")
    assert keys("list").startswith("alice\tactive")
    assert keys("rotate", "alice") not in ("", first)
    assert keys("revoke", "alice") == "alice: revoked"
    assert "active" not in keys("list")
    assert "'alice' has no key" in _fails(capsys, "keys", str(config), "revoke", "alice")
    assert "needs a name" in _fails(capsys, "keys", str(config), "create")
