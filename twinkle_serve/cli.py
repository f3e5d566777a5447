"""The ``twinkle-serve`` command, all of whose subcommands begin with a configuration.

Knows arguments, exit codes and what is printed. Does not know how the service works or is started (up.py).
Imports ray and torch only where a command needs them.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from twinkle_serve import __version__
from twinkle_serve.config import Config, load_config
from twinkle_serve.serve_file import to_serve_file
from twinkle_serve.up import UpError, in_url, serve_until_stopped


class CommandError(Exception):
    """Ends the command with its message, one line on stderr, and exit code 1."""


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
    except (ValueError, OSError, RuntimeError) as error:  # the last: ~user without such a user
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


def up(config: Config, options: argparse.Namespace) -> None:
    """Serve until a signal comes."""
    from twinkle_serve.cluster.haproxy import NoHaproxy

    try:
        serve_until_stopped(config)
    except (UpError, NoHaproxy) as error:
        raise CommandError(str(error)) from None


def check_config(config: Config, options: argparse.Namespace) -> None:
    """Print one line; load_config has done the work."""
    names = ", ".join(model.name for model in config.models)
    print(f"{options.config}: fine; serves {names} at http://{in_url(config.http.host)}:{config.http.port}")


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
