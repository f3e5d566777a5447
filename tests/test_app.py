"""build_app: from any form of configuration, without torch, and never open to the network by accident."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from twinkle_serve.config import Config, load_config

TREE: dict[str, Any] = {"models": [{"name": "m", "path": "/m"}], "http": {"replicas": 3}}


def _build(config: Any) -> Any:
    from twinkle_serve.app import build_app

    return build_app(config)._bound_deployment


def test_every_form_of_configuration_makes_the_same_deployment(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(TREE))
    for config in (TREE, path, str(path), load_config(path)):
        deployment = _build(config)
        assert (deployment.name, deployment.num_replicas) == ("ingress", 3)
        assert deployment.max_ongoing_requests >= 2000  # long polls of one sampling client alone
        assert deployment.ray_actor_options["num_cpus"] == 0


def test_a_wrong_tree_is_refused() -> None:
    with pytest.raises(ValueError, match="models"):
        _build({"models": []})


def test_the_address_that_serve_listens_on_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    from twinkle_serve import app

    class Client:
        class http_config:  # noqa: N801
            host, port = "0.0.0.0", 80

    monkeypatch.setattr(app.ray, "is_initialized", lambda: True)
    monkeypatch.setattr(app, "_get_global_client", lambda **_: Client)
    with pytest.raises(ValueError, match=r"auth\.mode open lets anybody in"):
        _build(TREE)
    assert app._as_bound(Config.model_validate(TREE | {"auth": {"allow_public": True}})).http.port == 80


def test_an_ingress_replica_needs_no_torch(tmp_path: Path) -> None:
    program = """
import sys
import twinkle_serve.app, twinkle_serve.cluster.coordinator, twinkle_serve.cluster.client
import twinkle_serve.gateway.app, twinkle_serve.storage.secret
sys.exit(bool({"torch", "transformers"} & set(sys.modules)))
"""
    assert subprocess.run([sys.executable, "-c", program], check=False, cwd=tmp_path).returncode == 0
