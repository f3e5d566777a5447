"""Loading a configuration: overrides, paths, and errors that name the key."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

import pytest
import yaml
from pydantic import BaseModel, ValidationError

from twinkle_serve.config import Config, load_config

MODELS = [{"name": "m", "path": "models/m"}]


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)

    def write(tree: object) -> Path:
        path = tmp_path / "config.yaml"
        path.write_text(tree if isinstance(tree, str) else yaml.safe_dump(tree))
        return path

    return write


def test_defaults_are_for_one_machine(write) -> None:
    config = load_config(write({"models": MODELS}))
    assert (config.http.host, config.http.port, config.http.replicas) == ("127.0.0.1", 8000, 2)
    assert (config.auth.mode, config.models[0].ranks) == ("open", 1)


def test_relative_paths_are_taken_from_the_current_directory(write, tmp_path: Path) -> None:
    config = load_config(write({"models": [*MODELS, {"name": "n", "path": "../n"}]}))
    assert config.storage.root == tmp_path / "twinkle-data"
    assert config.models[0].path == str(tmp_path / "models/m")
    assert config.models[1].path == str(tmp_path.parent / "n")


def test_absolute_paths_home_and_hub_references_stay_what_they_mean(
    write, tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    paths = ["/models/m", "ms://Qwen/Qwen3-8B", "~/m"]
    models = [{"name": path, "path": path} for path in paths]
    config = load_config(write({"models": models, "storage": {"root": "~/data"}}))
    assert [m.path for m in config.models] == ["/models/m", "ms://Qwen/Qwen3-8B", str(tmp_path / "home/m")]
    assert config.storage.root == tmp_path / "home/data"


@pytest.mark.parametrize(
    ("override", "read", "value"),
    [
        ("http.port=9001", lambda c: c.http.port, 9001),
        ("models.0.name=other", lambda c: c.models[0].name, "other"),
        ("models.0.sampler.max_batch=3", lambda c: c.models[0].sampler.max_batch, 3),
        ("models.0.deterministic=true", lambda c: c.models[0].deterministic, True),
        ("models.0.max_context_length=null", lambda c: c.models[0].max_context_length, None),
        ("models=[{name: x, path: /a=b}]", lambda c: c.models[0].path, "/a=b"),
        ("storage.root=/a b/c", lambda c: str(c.storage.root), "/a b/c"),
    ],
)
def test_an_override_sets_one_key(write, override: str, read, value) -> None:
    assert read(load_config(write({"models": MODELS}), [override])) == value


def test_overrides_can_build_a_model_list_from_nothing(write) -> None:
    config = load_config(
        write(""), ["models.0.name=a", "models.0.path=/a", "models.1.name=b", "models.1.path=/b"]
    )
    assert [(m.name, m.path) for m in config.models] == [("a", "/a"), ("b", "/b")]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("http.port", "expected dotted.key=value"),
        ("models.2.name=x", "'2' is not an index up to 1"),
        ("models.x.name=x", "'x' is not an index up to 1"),
        ("models.0.name.deep=x", "'name' is below a plain value|'deep' is below a plain value"),
        ("http.port=0", "http.port\n"),
        ("http.speed=9", "http.speed\n"),
        ("models.0.max_rank=64", r"models.0.max_rank\n"),
    ],
)
def test_a_wrong_override_is_named(write, override: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_config(write({"models": MODELS}), [override])


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ("{", "is not YAML"),
        ("- a", "a mapping of settings is expected"),
        ("", "models\n"),
        ({"models": []}, "models\n"),
        ({"models": MODELS * 2}, "names must be unique"),
        ({"models": MODELS, "modles": 1}, "modles\n"),
    ],
)
def test_a_wrong_file_is_refused_with_the_key(write, tree: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_config(write(tree))


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.0.4", "example.org"])
def test_open_mode_stays_on_the_loopback_address(host: str) -> None:
    tree = {"models": MODELS, "http": {"host": host}}
    with pytest.raises(ValidationError, match="must be a loopback address"):
        Config.model_validate(tree)
    assert Config.model_validate(tree | {"auth": {"allow_public": True}}).http.host == host
    assert Config.model_validate(tree | {"auth": {"mode": "keys"}}).http.host == host


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.8.8", "::1", "localhost"])
def test_loopback_addresses_are_known(host: str) -> None:
    assert Config.model_validate({"models": MODELS, "http": {"host": host}}).http.host == host


def test_a_serve_deploy_file_is_a_configuration_too(write, tmp_path: Path) -> None:
    application = {"import_path": "twinkle_serve.app:build_app", "args": {"models": MODELS}}
    path = write({"http_options": {"port": 8100}, "applications": [application]})
    config = load_config(path, ["models.0.name=other"])
    assert (config.http.port, config.models[0].name) == (8100, "other")
    assert config.models[0].path == str(tmp_path / "models/m")


def test_one_group_at_least_must_train() -> None:
    model = {"name": "m", "path": "p", "groups": 2}
    assert Config.model_validate({"models": [model | {"sampling_groups": 1}]}).models[0].sampling_groups == 1
    with pytest.raises(ValidationError, match="sampling_groups 2 must be below groups 2"):
        Config.model_validate({"models": [model | {"sampling_groups": 2}]})


def test_every_key_is_described() -> None:
    def bare(model: type[BaseModel], where: str) -> list[str]:
        found = []
        for name, field in model.model_fields.items():
            inner = [
                kind for kind in (field.annotation, *get_args(field.annotation)) if isinstance(kind, type)
            ]
            models = [kind for kind in inner if issubclass(kind, BaseModel)]
            found += [key for kind in models for key in bare(kind, f"{where}{name}.")]
            if not models and not field.description:
                found.append(where + name)
        return found

    assert bare(Config, "") == []
