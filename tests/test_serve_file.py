"""Our configuration in the form of ``serve deploy``: Ray Serve accepts it, and it comes back the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from twinkle_serve.config import Config, load_config
from twinkle_serve.serve_file import IMPORT_PATH, from_serve_file, to_serve_file

DEPLOYMENTS = sorted((Path(__file__).parents[1] / "deployments").glob("*.yaml"))


def _serve_file(**application: object) -> dict[str, object]:
    return {"applications": [{"import_path": IMPORT_PATH, "args": {"models": []}, **application}]}


def test_the_file_comes_back_as_the_same_configuration() -> None:
    config = {
        "models": [{"name": "m", "path": "/m"}],
        "http": {"host": "::1", "port": 1, "route_prefix": "/x"},
    }
    assert from_serve_file(to_serve_file(config)) == config


def test_serves_own_address_and_route_count_where_ours_say_nothing() -> None:
    tree = _serve_file(route_prefix="/x") | {"http_options": {"host": "127.0.0.1", "port": 81}}
    assert from_serve_file(tree)["http"] == {"host": "127.0.0.1", "port": 81, "route_prefix": "/x"}
    tree = _serve_file(args={"http": {"port": 82}}) | {"http_options": {"port": 81}}
    assert from_serve_file(tree)["http"] == {"port": 82}


def test_reading_leaves_the_tree_alone() -> None:
    tree = _serve_file(route_prefix="/x")
    from_serve_file(tree)["models"].append("changed")
    assert tree == _serve_file(route_prefix="/x")


@pytest.mark.parametrize(
    "applications", [None, [], [{"import_path": "other:app"}], [{"import_path": IMPORT_PATH}] * 2]
)
def test_exactly_one_application_must_be_ours(applications: object) -> None:
    with pytest.raises(ValueError, match="applications: exactly one"):
        from_serve_file({"applications": applications})


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"applications": 5}, "applications must be a list"),
        ({"applications": ["a"]}, "applications must be a list"),
        ({"applications": [], "http_options": 5}, "http_options must be a mapping"),
        (
            {"applications": [{"import_path": IMPORT_PATH, "args": [1]}]},
            "args and args.http must be",
        ),
        (
            {
                "applications": [{"import_path": IMPORT_PATH, "args": {"http": "x"}}],
                "http_options": {"port": 1},
            },
            "args and args.http must be",
        ),
    ],
)
def test_another_form_is_an_error_and_no_traceback(tree: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        from_serve_file(tree)


@pytest.mark.parametrize("path", DEPLOYMENTS, ids=lambda path: path.name)
def test_deployments_are_right_for_us_and_for_serve(path: Path) -> None:
    from ray.serve.schema import ServeDeploySchema

    ServeDeploySchema.model_validate(yaml.safe_load(path.read_text()))
    config = load_config(path)
    printed = to_serve_file(config.model_dump(mode="json"))
    ServeDeploySchema.model_validate(printed)
    assert Config.model_validate(from_serve_file(printed)) == config
