"""What the container files refer to is there and fits together. Nothing is built: that needs docker."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from twinkle_serve.config import load_config

ROOT = Path(__file__).parents[2]
DOCKER = ROOT / "deployments" / "docker"
MONITORING = ROOT / "deployments" / "monitoring"


@pytest.fixture
def compose() -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load((DOCKER / "compose.yaml").read_text())
    return found


@pytest.mark.parametrize("name", ["Dockerfile.cpu", "Dockerfile.cuda"])
def test_a_dockerfile_copies_what_exists_and_installs_extras_that_exist(name: str) -> None:
    text = (DOCKER / name).read_text()
    for line in re.findall(r"^COPY (.+)$", text, re.M):
        for source in line.split()[:-1]:
            assert (ROOT / source).exists(), source
    (extras,) = re.findall(r'"\.\[([\w,]+)\]"', text)
    project = (ROOT / "pyproject.toml").read_text()
    for extra in extras.split(","):
        assert re.search(rf"^{extra} = \[", project, re.M), extra
    assert "USER twinkle" in text
    assert 'ENTRYPOINT ["twinkle-serve"]' in text


def test_the_containers_configuration_is_right() -> None:
    config = load_config(DOCKER / "config.yaml")
    assert config.auth.mode == "keys", "it listens on every address of the container"
    assert str(config.storage.root) == "/data"
    assert str(config.monitoring.log_file).startswith("/data/")


def test_prometheus_asks_where_ray_answers() -> None:
    config = load_config(DOCKER / "config.yaml")
    scrape = yaml.safe_load((MONITORING / "prometheus.yml").read_text())
    (job,) = scrape["scrape_configs"]
    assert job["static_configs"][0]["targets"] == [f"127.0.0.1:{config.ray.metrics_port}"]


def test_what_compose_mounts_from_here_exists(compose: dict[str, Any]) -> None:
    for service in compose["services"].values():
        for volume in service["volumes"]:
            source = volume.split(":")[0]
            if source.startswith("."):
                assert (DOCKER / source).exists(), source
    assert set(compose["volumes"]) == {"data", "metrics"}


def test_ports_are_published_on_loopback_only(compose: dict[str, Any]) -> None:
    published = [port for service in compose["services"].values() for port in service.get("ports", [])]
    assert published
    assert all(port.startswith("127.0.0.1:") for port in published)


def test_grafana_finds_prometheus_and_the_dashboard(compose: dict[str, Any]) -> None:
    provisioning = MONITORING / "grafana" / "provisioning"
    (source,) = yaml.safe_load((provisioning / "datasources" / "prometheus.yaml").read_text())["datasources"]
    prometheus = compose["services"]["prometheus"]
    assert f"--web.listen-address={source['url'].removeprefix('http://')}" in prometheus["command"]
    (provider,) = yaml.safe_load((provisioning / "dashboards" / "twinkle-serve.yaml").read_text())[
        "providers"
    ]
    mounts = [volume.split(":")[1] for volume in compose["services"]["grafana"]["volumes"]]
    assert provider["options"]["path"] in mounts
    assert "GF_SECURITY_ADMIN_PASSWORD" in compose["services"]["grafana"]["environment"]
