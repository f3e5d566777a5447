"""``twinkle-serve losses``: write a loss down in the configuration file, list the whitelist, verify it.

Knows the file as text, so that its comments stay. Does not know how a loss is fetched (hub/losses.py) or run
(engine/whitelist.py).
"""

from __future__ import annotations

import textwrap
from pathlib import Path

import yaml

from twinkle_serve.config import Config, load_config
from twinkle_serve.hub.losses import LossSourceError, fetch_loss, verified
from twinkle_serve.loss_config import WhitelistedLoss
from twinkle_serve.protocol.losses import LOSSES


def add_loss(config: Config, file: Path, path: str, revision: str | None) -> None:
    """Try the loss, pin it by its hash and write it into the whitelist in ``file``. Raises LossSourceError,
    and then the file is as it was."""
    from twinkle_serve.engine.whitelist import checked_formula

    source = fetch_loss(path, revision)
    checked_formula(source)
    entry = WhitelistedLoss(
        **source.terms.model_dump(), path=path, revision=revision, sha256=source.sha256
    ).model_dump(exclude_defaults=True)
    known = [loss.name for loss in config.losses.whitelist]
    if source.terms.name in known:
        raise LossSourceError(
            f"{source.terms.name} is on the whitelist of {file} already; remove it there first"
        )
    before = file.read_text()
    file.write_text(_with_entry(before, entry))
    try:
        names = [loss.name for loss in load_config(file).losses.whitelist]
    except ValueError:
        names = []
    if names != [source.terms.name, *known]:
        file.write_text(before)
        raise LossSourceError(f"{file} cannot be edited; put this under losses.whitelist:\n{_as_item(entry)}")
    print(f"{source.terms.name}: added to {file} with sha256 {source.sha256}; deploy it to load it")


def list_losses(config: Config) -> None:
    for name in LOSSES:
        print(f"{name}\tbuilt in")
    for loss in config.losses.whitelist:
        print(
            f"{loss.name}\t{loss.path}@{loss.revision or 'local'}\tsha256 {loss.sha256}\t{loss.description}"
        )


def verify_losses(config: Config) -> None:
    """Fetch and try every loss of the whitelist. Raises LossSourceError for one that is not as allowed."""
    from twinkle_serve.engine.whitelist import checked_formula

    for loss in config.losses.whitelist:
        checked_formula(verified(loss))
        print(f"{loss.name}: fine")


def _as_item(entry: dict[str, object]) -> str:
    text = yaml.safe_dump(entry, sort_keys=False, allow_unicode=True, default_flow_style=None)
    return "    - " + textwrap.indent(text, "      ").lstrip()


def _with_entry(text: str, entry: dict[str, object]) -> str:
    """``text`` with the item first in losses.whitelist; unchanged where there is no place for it."""
    item = _as_item(entry)
    lines = text.splitlines(keepends=True)
    for index, line in enumerate(lines):
        if line.startswith("losses:") and line.rstrip() != "losses:":
            return text  # in another style, which a second key of that name would undo
        if line.rstrip() == "losses:":
            rest = lines[index + 1 :]
            if rest and rest[0].strip() == "whitelist:":
                return "".join([*lines[: index + 2], item, *rest[1:]])
            return "".join([*lines[: index + 1], "  whitelist:\n", item, *rest])
    end = "" if not text or text.endswith("\n") else "\n"
    return f"{text}{end}losses:\n  whitelist:\n{item}"
