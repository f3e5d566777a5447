"""Our configuration inside a ``serve deploy`` file, and back.

Knows the layout of Ray Serve's file. Does not know what our settings mean, nor ray.
"""

from __future__ import annotations

import copy
from typing import Any

IMPORT_PATH = "twinkle_serve.app:build_app"


def from_serve_file(tree: dict[str, Any]) -> dict[str, Any]:
    """The configuration tree in the ``args`` of the one application that is ours.

    What Serve's own part says about address and route counts where ``args.http`` says nothing. Raises
    ValueError when there is not exactly one such application.
    """
    given, options = tree["applications"] or [], tree.get("http_options") or {}
    if not isinstance(given, list) or not all(isinstance(app, dict) for app in given):
        raise ValueError("applications must be a list of mappings")
    if not isinstance(options, dict):
        raise ValueError("http_options must be a mapping")
    applications = [app for app in given if app.get("import_path") == IMPORT_PATH]
    if len(applications) != 1:
        raise ValueError(
            f"applications: exactly one must have import_path {IMPORT_PATH}, found {len(applications)}"
        )
    (application,) = applications
    http = {key: options[key] for key in ("host", "port") if key in options}
    if "route_prefix" in application:
        http["route_prefix"] = application["route_prefix"]
    config: dict[str, Any] = copy.deepcopy(application.get("args") or {})
    if not isinstance(config, dict) or not isinstance(config.get("http") or {}, dict):
        raise ValueError("applications: args and args.http must be mappings")
    if http:
        config["http"] = http | (config.get("http") or {})
    return config


def to_serve_file(config: dict[str, Any]) -> dict[str, Any]:
    """The file for ``serve deploy``. ``config`` is a dumped Config with all of ``http`` in it."""
    http = config["http"]
    return {
        "proxy_location": "HeadOnly",
        "http_options": {"host": http["host"], "port": http["port"]},
        "applications": [
            {
                "name": "twinkle",
                "route_prefix": http["route_prefix"],
                "import_path": IMPORT_PATH,
                "args": config,
            }
        ],
    }
