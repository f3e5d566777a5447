"""The ``twinkle-serve`` command: check a configuration, and run the service in the foreground.

Knows arguments, exit codes and what is printed. Does not know how the service works. Imports ray only where
a command needs it.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import socket
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import yaml
from pydantic import ValidationError

from twinkle_serve import __version__
from twinkle_serve.config import Config, load_config
from twinkle_serve.serve_file import to_serve_file

STOP_S = 25.0


class CommandError(Exception):
    """Ends the command with its message, one line on stderr, and exit code 1."""


class Stopped(BaseException):
    """SIGTERM or Ctrl-C arrived."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    options = _parser().parse_args(arguments)
    try:
        options.run(_load(options), options)
    except CommandError as error:
        print(f"twinkle-serve: {error}", file=sys.stderr, flush=True)
        return 1
    return 0


def _load(options: argparse.Namespace) -> Config:
    try:
        return load_config(options.config, options.set)
    except ValidationError as error:
        raise CommandError("; ".join(_problem(detail) for detail in error.errors())) from None
    except (ValueError, OSError) as error:
        raise CommandError(str(error)) from None


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="twinkle-serve", description="Operate a Twinkle Serve server.")
    parser.add_argument("--version", action="version", version=f"twinkle-serve {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, run: Any, text: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=text)
        sub.add_argument("config", type=Path, metavar="CONFIG.yaml")
        sub.add_argument("--set", action="append", metavar="dotted.key=value", help="override a setting")
        sub.set_defaults(run=run)
        return sub

    command("up", up, "Run the service in the foreground until Ctrl-C or SIGTERM.")
    command("check-config", check_config, "Say whether a configuration is right.")
    command("plan", plan, "Compute the memory of each rank, without loading, and refuse what cannot fit.")
    command("doctor", doctor, "Look at ports, disk, GPUs, versions and model files before anything starts.")
    printing = command("print-config", print_config, "Print the configuration with overrides applied.")
    printing.add_argument("--serve", action="store_true", help="in the form that `serve deploy` takes")
    keys = command("keys", keys_command, "Give out, list, rotate and revoke API keys (auth.mode keys).")
    keys.add_argument("action", choices=["create", "list", "rotate", "revoke"])
    keys.add_argument("name", nargs="?", help="whom the key is for")
    export = command("export", export_command, "Copy a checkpoint's adapter out of the storage.")
    export.add_argument("path", metavar="tinker://RUN/KIND/NAME")
    export.add_argument("output", type=Path, help="a directory that does not exist yet")
    export.add_argument("--merged", action="store_true", help="merge it into its base model")
    losses = command("losses", losses_command, "Allow, list and verify losses with code of their own.")
    losses.add_argument("action", choices=["add", "list", "verify"])
    losses.add_argument("path", nargs="?", help="directory, or ms://owner/name, with loss.json and loss.py")
    losses.add_argument("--revision", help="pinned revision on ModelScope")
    return parser


def _problem(detail: Any) -> str:
    where = ".".join(str(part) for part in detail["loc"])
    what = detail["msg"].removeprefix("Value error, ")
    return f"{where}: {what}" if where else what


def check_config(config: Config, options: argparse.Namespace) -> None:
    """Print one line; load_config has done the work."""
    names = ", ".join(model.name for model in config.models)
    print(f"{options.config}: fine; serves {names} at http://{_in_url(config.http.host)}:{config.http.port}")


def plan(config: Config, options: argparse.Namespace) -> None:
    """The budget of each model; an error if one does not fit into the memory that its devices have."""
    from twinkle_serve.plan import budget_of, find_shapes, report, verdict

    refused = []
    for model in config.models:
        try:
            budget = budget_of(model, find_shapes(model.path))
        except ValueError as error:
            raise CommandError(str(error)) from None
        print(report(budget), end="\n\n")
        if not budget.fits:
            refused.append(verdict(budget))
    if refused:
        raise CommandError("; ".join(refused))


def doctor(config: Config, options: argparse.Namespace) -> None:
    """A line for each finding; an error if one of them is bad."""
    from twinkle_serve.doctor import examine, verdict

    findings = []
    for finding in examine(config):
        print(finding, flush=True)
        findings.append(finding)
    problem = verdict(findings)
    if problem is not None:
        raise CommandError(problem)


def print_config(config: Config, options: argparse.Namespace) -> None:
    """The whole configuration, or with --serve what differs from the defaults, as a deploy file."""
    if options.serve:
        changed = config.model_dump(mode="json", exclude_defaults=True)
        if config.limits.tenants:
            # Whole: what is left out of a tenant's limits is not the default but what limits.tenant says.
            changed["limits"]["tenants"] = config.model_dump(mode="json")["limits"]["tenants"]
        tree = to_serve_file(changed | {"http": config.http.model_dump(mode="json")})
    else:
        tree = config.model_dump(mode="json")
    print(yaml.safe_dump(tree, sort_keys=False, allow_unicode=True), end="")


def keys_command(config: Config, options: argparse.Namespace) -> None:
    """A new key is printed once and cannot be shown again; a revoked one stops working within a minute."""
    from sqlalchemy.exc import SQLAlchemyError

    from twinkle_serve.storage.keys import KeyStore

    if options.action != "list" and options.name is None:
        raise CommandError(f"keys {options.action} needs a name")
    try:
        with contextlib.closing(KeyStore(config.storage.root)) as store:
            if options.action == "list":
                for record in store.list():
                    state = "revoked" if record.revoked_at else "active"
                    since = time.ctime(record.revoked_at or record.created_at)
                    print(f"{record.name}\t{state}\tsince {since}")
            else:
                result = getattr(store, options.action)(options.name)
                print(result if result is not None else f"{options.name}: revoked")
    except (ValueError, OSError, SQLAlchemyError) as error:
        raise CommandError(str(error)) from None


def export_command(config: Config, options: argparse.Namespace) -> None:
    """Needs no running server, and does not disturb one."""
    from sqlalchemy.exc import SQLAlchemyError

    from twinkle_serve.exporting import export
    from twinkle_serve.storage.checkpoints import CheckpointError

    try:
        print(export(config, options.path, options.output, options.merged))
    except (ValueError, OSError, CheckpointError, SQLAlchemyError) as error:
        raise CommandError(str(error)) from None


def losses_command(config: Config, options: argparse.Namespace) -> None:
    """``add`` writes into the configuration file; a server takes it up when it starts again."""
    from twinkle_serve import loss_commands
    from twinkle_serve.hub.losses import LossSourceError

    try:
        if options.action == "list":
            loss_commands.list_losses(config)
        elif options.action == "verify":
            loss_commands.verify_losses(config)
        elif options.path is None:
            raise CommandError("losses add needs a path")
        else:
            loss_commands.add_loss(config, options.config, options.path, options.revision)
    except (LossSourceError, OSError) as error:
        raise CommandError(str(error)) from None


# up -----------------------------------------------------------------------------------------------------


def up(config: Config, options: argparse.Namespace) -> None:
    """Serve until a signal comes. Only the ``ready`` line goes to stdout, everything else to stderr."""
    ready = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    os.environ["HF_HUB_OFFLINE"] = "1"
    stop, with_haproxy = _Stop(), config.http.proxy == "haproxy"
    try:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, stop)
        _require_free(config.http.host, config.http.port)
        _require_writable(config)
        # Imported late: `check-config` must not wait for ray, whose switches are read when it is imported.
        from twinkle_serve.cluster.private_ray import private_ray

        _say("starting Ray ...")
        with private_ray(config.ray, "twinkle-serve", stop.tell, with_haproxy):
            try:
                _start(config)
                print(f"ready {_url(config)}", file=ready, flush=True)
                threading.Event().wait()
            finally:
                _limit_stopping()
                _shut_down()
    except Stopped:
        _say("stopped")


class _Stop:
    """What SIGTERM and Ctrl-C do."""

    def __init__(self) -> None:
        self._is_told = False

    def __call__(self, number: int, _: Any) -> NoReturn:
        for each in (signal.SIGTERM, signal.SIGINT):
            signal.signal(each, signal.SIG_IGN)
        self.tell(number)
        raise Stopped

    def tell(self, number: int) -> None:
        """The time to stop counts from the first signal, also where it cannot be followed yet."""
        if not self._is_told:
            self._is_told = True
            _say(f"stopping on {signal.Signals(number).name} ...")
            _limit_stopping()


def _start(config: Config) -> None:
    import logging

    import ray
    from ray import serve

    from twinkle_serve.app import build_app
    from twinkle_serve.cluster import coordinator
    from twinkle_serve.cluster.deployment import Deployment

    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    # First of all, so that the model loads while Serve starts.
    handle = coordinator.find_or_create(Deployment(config))
    handle.ping.remote()
    serve.start(proxy_location="HeadOnly", http_options={"host": config.http.host, "port": config.http.port})
    serve.run(build_app(config), name="twinkle", route_prefix=config.http.route_prefix)
    node = ray.nodes()[0]
    _say(f"metrics at http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics")
    told = ""
    while True:
        status = ray.get(handle.ping.remote())
        if status.message != told:
            told = status.message
            _say(told)
        if status.state == "failed":
            raise CommandError(status.message)
        if status.state == "ready" and _healthy(config):
            return
        time.sleep(0.1)


def _shut_down() -> None:
    import ray
    from ray import serve

    from twinkle_serve.cluster import coordinator

    serve.shutdown()
    try:
        handle = coordinator.find()
        ray.get(handle.stop.remote(), timeout=10)
    except (ValueError, ray.exceptions.RayError) as error:
        _say(f"the coordinator did not stop in order: {error}")


def _limit_stopping() -> None:
    """Whatever hangs while stopping, leave no process behind and end in time."""

    def end() -> None:
        from twinkle_serve.cluster.private_ray import descendants

        _say("stopping takes too long: killing what is left")
        for pid in descendants(os.getpid()):
            os.kill(pid, signal.SIGKILL)
        os._exit(1)

    timer = threading.Timer(STOP_S, end)
    timer.daemon = True
    timer.start()


def _require_free(host: str, port: int) -> None:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise CommandError(f"http.port {port} on {host} cannot be used: {error.strerror}") from None


def _require_writable(config: Config) -> None:
    """Every process writes there, and would fail in its own words, long after this."""
    root, log_file = config.storage.root, config.monitoring.log_file
    try:
        root.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=root):
            pass
    except OSError as error:
        raise CommandError(f"storage.root: cannot write in {root}: {error.strerror}") from None
    if log_file is None:
        return
    try:
        log_file.parent.mkdir(parents=True, exist_ok=True)
        log_file.open("ab").close()  # its directory need not be ours
    except OSError as error:
        raise CommandError(f"monitoring.log_file: cannot write {log_file}: {error.strerror}") from None


def _url(config: Config) -> str:
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(config.http.host, config.http.host)
    return f"http://{_in_url(host)}:{config.http.port}{config.http.route_prefix.rstrip('/')}"


def _in_url(host: str) -> str:
    return f"[{host}]" if ":" in host else host


def _healthy(config: Config) -> bool:
    try:
        # A proxy set in the environment is for the world outside.
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(f"{_url(config)}/api/v1/healthz", timeout=5) as answer:
            return bool(answer.status == 200)
    except (urllib.error.URLError, OSError):
        return False


def _say(text: str) -> None:
    print(f"[twinkle-serve] {text}", file=sys.stderr, flush=True)
